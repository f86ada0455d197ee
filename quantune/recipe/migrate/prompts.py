"""Prompts of alpaca and of its styles, and those that a YAML spells out, as keys of a source."""

from __future__ import annotations

import string
from collections.abc import Container
from typing import Any

from quantune.recipe.migrate.values import Unusable

_CHAT = ("chat_template", "chat_template.default", "chat_template.load")
_ALPACA = ("Below is an instruction that describes a task", "paired with an input that provides further context")
_REQUEST = "Write a response that appropriately completes the request."
_SYSTEM = (f"{_ALPACA[0]}, {_ALPACA[1]}. {_REQUEST}", f"{_ALPACA[0]}. {_REQUEST}")
_STYLES = {
    "chat": ("SYSTEM: {system}\nUSER: {instruction}\n{input}\nASSISTANT:", "{input}\n"),
    "chatml": (
        "<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "\n{input}",
    ),
}
"""Alpaca's prompt in other styles, and what a row without input leaves out."""


def _styled(style: str) -> dict[str, str]:
    """Alpaca's prompts in another style, as keys of a source."""
    full, given = _STYLES[style]
    return {
        "format": "instruct",
        "response_column": "output",
        "template": full.replace("{system}", _SYSTEM[0]),
        "input_column": "input",
        "template_no_input": full.replace(given, "").replace("{system}", _SYSTEM[1]),
    }


PROMPTS: dict[str, dict[str, str]] = {
    **{name: {"format": "chat"} for name in _CHAT},
    "alpaca": {"format": "alpaca"},
    "completion": {"format": "completion"},
    **{f"alpaca:{style}": _styled(style) for style in _STYLES},
}
"""The keys of a source for each `type` that is text."""
CUSTOM = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_prompt": "",
    "system_format": "{system}",
}
"""The keys of a `type` that is a mapping, with what they are where they are absent."""
_PART_IN = {
    "field_instruction": ("template", "template_no_input"),
    "field_input": ("input_column", "template"),
    "field_output": ("response_column",),
    "format": ("template",),
    "no_input_format": ("template_no_input",),
    "system_prompt": ("template", "template_no_input"),
    "system_format": ("template", "template_no_input"),
}
"""The keys of a source that each of them has a part in; that there is a prompt at all says `format`."""
SYSTEM_COLUMN = "there, the column system of a row, where it has one, takes the place of system_prompt"


def parts_of(key: str, made: Container[str]) -> set[str]:
    """What a key has a part in; where there is one prompt for all rows, it is that."""
    return {part for part in _PART_IN[key] if part in made} or {"template"}


def prompt_of(given: dict[Any, Any]) -> dict[str, str]:
    """The keys of a source for a prompt that is spelled out.

    There, `format` is the prompt of rows with an input and `no_input_format` of those without, and both name the
    columns as {instruction} and {input} whatever they are called.
    """
    said = {key: default if given.get(key) is None else str(given[key]) for key, default in CUSTOM.items()}
    system = said["system_format"].replace("{system}", said["system_prompt"]) if said["system_prompt"] else ""
    columns = {"instruction": said["field_instruction"], "input": said["field_input"]}
    head = system.replace("{", "{{").replace("}", "}}")
    template, without = (head + _renamed(said[key], columns) for key in ("format", "no_input_format"))
    made = {"format": "instruct", "response_column": said["field_output"], "template": template}
    if template == without:
        return made
    return {**made, "input_column": said["field_input"], "template_no_input": without}


def _renamed(template: str, columns: dict[str, str]) -> str:
    """The template with its columns renamed; raises Unusable where it has others."""
    made = ""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise Unusable(f"expected a template such as '{{instruction}} {{input}}': {error}") from None
    for literal, column, spec, conversion in parts:
        made += literal.replace("{", "{{").replace("}", "}}")
        if column is None:
            continue
        if column not in columns or spec or conversion:
            raise Unusable(f"expected {{instruction}} and {{input}} in a template, found {{{column}}}")
        made += f"{{{columns[column]}}}"
    return made
