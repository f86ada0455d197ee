"""The references of docs/: of the recipe, from the docstrings under the fields, and of the codes of problems.

    make docs

writes docs/recipe.md and docs/errors.md with them.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs
import tomli

from quantune.recipe import legacy
from quantune.recipe.codes import CODES
from quantune.recipe.schema import QatConfig, Recipe, SourceConfig, SpecialTokensConfig
from quantune.recipe.structure import is_union

INTRODUCTION = """\
# The recipe

A recipe is a TOML file. Every key is below; an unknown one is an error. Paths of what is read are relative to the
recipe's folder, the run folder is relative to the current directory. `--set section.key=value` overrides a key on the
command line, the value written as in TOML (`--set training.max_steps=50`, `--set 'adapter.targets=["q_proj"]'`,
`--set data.train[0].limit=100`). Of two keys that are given in place of each other (`epochs` and `max_steps`,
`warmup_ratio` and `warmup_steps`, `every_steps` and `per_epoch`), the one on the command line replaces the other.

All problems of a recipe are reported at once, each with its place, what was expected and found, and a stable code; the
exit code is then 2:

    recipe.toml:14:1 [adapter.alpa] unknown key "alpa"  QT012
       14 | alpa = 32
          | ^^^^
          = did you mean "alpha"?

This page is generated from the docstrings in `quantune/recipe/schema.py`.
"""

OLDER = (
    'adapter = "qlora"',
    "load_in_4bit = true",
    "load_in_8bit = true",
    'model_quantization_config = "Mxfp4Config"',
    'model_quantization_config = "FineGrainedFP8Config"',
    'model_quantization_config = {torchao = {weight_dtype = "int4"}}',
    'model_quantization_config = {backend = "torchao", weight_dtype = "int8"}',
    'peft = {backend = "bnb", weight_dtype = "nf4"}',
    "load_in_4bit = true, bnb_config_kwargs = {bnb_4bit_use_double_quant = false}",
    "load_in_4bit = true, quantize_moe_experts = true",
    'quantization = {backend = "fp8", config_kwargs = {weight_block_size = [64, 64]}}',
)
"""Older spellings that the reference shows."""
OLDER_INTRODUCTION = """\
## Older spellings

These are understood, at the head of a recipe or in the table they belong to, each with a `DEPRECATED` warning that says
how to write it now. One that disagrees with another, or with `[quantization]`, is an error that shows both.

| older | now |
|---|---|
"""

CODES_INTRODUCTION = """\
# The codes of recipe problems

`quantune explain QT012` tells the same on the command line. A code never changes its meaning. Examples are parts of
recipes that have the problem and no other; tests hold them to it.

This page is generated from `quantune/recipe/codes.py`.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of an attrs class, on one line."""
    docs: dict[str, str] = {}
    for base in cls.__mro__[1:]:
        if attrs.has(base):
            docs = {**field_docs(base), **docs}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def field_docs_if_any(cls: type) -> dict[str, str]:
    """As `field_docs`; nothing for a class that was made in a shell, by `make_class`, or compiled."""
    try:
        return field_docs(cls)
    except (OSError, TypeError, ValueError, SyntaxError, AssertionError):
        return {}


def literal_values(cls: type, key: str) -> tuple[Any, ...]:
    """The values that a field of an attrs class takes, where its type is a Literal; none where it can't be told."""
    try:
        annotation = get_type_hints(cls)[key]
    except Exception:  # annotations may be a plugin's code: names that exist for a checker only, and anything else
        return ()
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def render(extra: Mapping[str, type] = MappingProxyType({})) -> str:
    """The whole page; `extra` maps names of backends to their options classes."""
    parts = [INTRODUCTION]
    hints = get_type_hints(Recipe)
    for field in attrs.fields(Recipe):
        cls = next((member for member in (hints[field.name], *get_args(hints[field.name])) if attrs.has(member)), None)
        assert cls is not None
        parts.append(_section(f"[{field.name}]", cls))
        if field.name == "model":
            parts.append(_section("[model.special_tokens]", SpecialTokensConfig))
        if field.name == "data":
            parts.append(_section("[[data.train]] and [[data.eval]]", SourceConfig))
        if field.name == "training":
            parts.append(_section("[training.qat]", QatConfig))
        if field.name == "quantization":
            parts += [_section(f'[quantization] with backend = "{name}"', cls) for name, cls in extra.items()]
    parts.append(OLDER_INTRODUCTION + "\n".join(map(_older_row, OLDER)) + "\n")
    return "\n".join(parts)


def _older_row(spelling: str) -> str:
    """An older spelling beside what the legacy pass says to write."""
    warnings = legacy.rewrite(tomli.loads("made = {" + spelling + "}")["made"]).warnings
    ways = [way for warning in warnings for way in (warning.hint or "").removeprefix("write ").split("; write ")]
    return f"| `{spelling}` | {', '.join(f'`{way}`' for way in ways)} |"


def _section(title: str, cls: type) -> str:
    docs, hints = field_docs(cls), get_type_hints(cls)
    lines = [
        f"## `{title}`",
        "",
        inspect.getdoc(cls) or "",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field in attrs.fields(cls):
        if field.name == "options" or any(attrs.has(one) for one in _members(hints[field.name])):
            continue
        meaning = docs.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {type_words(hints[field.name])} | {default_words(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _members(annotation: Any) -> tuple[Any, ...]:
    """A type, and what a list of it or a choice among several holds."""
    return (annotation, *get_args(annotation))


def default_words(field: Any) -> str:
    """The default of an attrs field as a recipe writes it, in backticks; `required`, or nothing where it is unset."""
    if field.default is attrs.NOTHING:
        return "required"
    factory = isinstance(field.default, attrs.Factory)  # type: ignore[arg-type]  # a class at run time
    value = field.default.factory() if factory and not field.default.takes_self else field.default
    if value is None or value == {} or isinstance(value, attrs.Factory):  # type: ignore[arg-type]  # as above
        return ""
    value = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(value)}`"


def type_words(annotation: Any) -> str:
    """What a field of this type takes, in words; values stand in backticks."""
    names = {int: "integer", float: "number", str: "string", bool: "boolean"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        return f"list of {type_words(get_args(annotation)[0])}s"
    if get_origin(annotation) is dict:
        member = get_args(annotation)[1]
        return "table" if member is Any else f"table of {type_words(member)}s"
    if is_union(annotation):
        return " or ".join(type_words(member) for member in get_args(annotation) if member is not type(None))
    return str(annotation)


def render_codes() -> str:
    """docs/errors.md: every code with its explanation and examples, as Markdown."""
    parts = [CODES_INTRODUCTION]
    for code in CODES:
        explanation = textwrap.fill(code.explanation, 120)
        parts += [f"## {code.name}: {code.title}\n", f"{explanation}\n"]
        parts += [f"{_fenced(code.example)}\n", "Put right:\n", f"{_fenced(code.corrected)}\n"]
    return "\n".join(parts)


def _fenced(example: str) -> str:
    language = "console" if example.startswith("$") else "yaml" if example.startswith("# old.yaml") else "toml"
    return f"```{language}\n{example.rstrip()}\n```"
