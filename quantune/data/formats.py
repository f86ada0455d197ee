"""From a row to text: messages for the chat template, or a prompt and a response."""

from __future__ import annotations

import json
import string
from typing import Any

import attrs

from quantune.data.messages import encodable, read_messages
from quantune.data.sources import Row, kind
from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig


@attrs.frozen(kw_only=True)
class Conversation:
    """Messages to be rendered with a chat template."""

    messages: list[dict[str, Any]]
    """At least one, each with a `role`, a `content` that is text, and whatever else the row gives the template."""


@attrs.frozen(kw_only=True)
class PlainText:
    """A prompt and the text that follows it."""

    prompt: str
    """May be empty, then the response is all there is."""
    response: str
    """What is learned."""


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Stanford Alpaca's prompt, the answer on a line of its own as alpaca-lora and others have it."""
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The same for an instruction without an input."""


@attrs.frozen(kw_only=True)
class _Prompts:
    """How a row becomes a prompt."""

    template: str
    input_column: str | None
    """A column that may be empty or missing."""
    template_no_input: str
    """The template where it is."""

    def of(self, row: Row) -> str:
        """The prompt of one row."""
        has_input = self.input_column is None or row.values.get(self.input_column) not in (None, "")
        try:
            prompt = (self.template if has_input else self.template_no_input).format_map(_Columns(row))
        except (ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"{row.where}: the template can't be filled in, {error}; write a brace that is text twice, {{{{ or }}}}"
            ) from error
        return encodable(prompt, row.where)


def _prompts(source: SourceConfig) -> _Prompts | None:
    """The prompts of a source, None where messages or nothing stand in their place."""
    if source.format == "alpaca":
        return _Prompts(template=ALPACA, input_column="input", template_no_input=ALPACA_NO_INPUT)
    if source.template is None:
        return None
    return _Prompts(
        template=source.template,
        input_column=source.input_column,
        template_no_input=source.template_no_input or source.template,
    )


def read_example(row: Row, source: SourceConfig) -> Conversation | PlainText:
    """What a row says, by the source's format.

    Raises:
        DataError: a column is missing or does not hold what the format needs.
    """
    if source.format == "chat":
        return Conversation(messages=read_messages(_column(row, source.messages_column), source, row.where))
    if source.format == "completion":
        return PlainText(prompt="", response=_text(row, source.text_column))
    response = _text(row, "output" if source.format == "alpaca" else source.response_column)
    prompts = _prompts(source)
    if prompts is None:
        prompt = _text(row, source.prompt_column)
        return Conversation(messages=[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
    return PlainText(prompt=prompts.of(row), response=response)


def read_prompt(text: str, source: SourceConfig) -> Conversation | PlainText:
    """A prompt from outside, in the form that the prompts of `source` have.

    A template of one column is filled in with the text; one of several, or with an input, takes a JSON object with a
    key for each.

    Raises:
        DataError: the text is not such an object.
    """
    if source.format == "completion":
        return PlainText(prompt=text, response="")
    prompts = _prompts(source)
    if prompts is None:
        return Conversation(messages=[{"role": "user", "content": text}])
    columns = {name for _, name, _, _ in string.Formatter().parse(prompts.template_no_input) if name}
    values: Any = {name: text for name in columns}
    if len(columns) > 1 or prompts.input_column is not None:
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        if isinstance(given, dict) and columns <= given.keys():
            values = given
        elif len(columns) > 1:
            raise DataError(
                f"the prompt: expected a JSON object with {', '.join(sorted(columns))}, which the template of the "
                f"training data takes, found {text[:60]!r}"
            )
    return PlainText(prompt=prompts.of(Row(values=values, where="the prompt")), response="")


class _Columns(dict[str, Any]):
    """Looks columns up in a row, empty text for null."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row

    def __missing__(self, key: str) -> Any:
        value = _column(self.row, key)
        return "" if value is None else value


def _column(row: Row, name: str) -> Any:
    if name not in row.values:
        there_are = ", ".join(f'"{column}"' for column in row.values) or "none"
        raise DataError(f'{row.where}: expected a column "{name}", the columns are {there_are}')
    return row.values[name]


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise DataError(f'{row.where}: expected text in column "{name}", found {kind(value)}')
    return encodable(value, row.where)
