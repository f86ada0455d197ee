"""From a row to text: messages for the chat template, or a prompt and a response."""

from __future__ import annotations

import json
import string
from typing import Any

import attrs

from quantune.data.sources import Row, kind
from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig

ROLES = ("system", "user", "assistant", "tool")


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


def read_example(row: Row, source: SourceConfig) -> Conversation | PlainText:
    """What a row says, by the source's format.

    Raises:
        DataError: a column is missing or does not hold what the format needs.
    """
    if source.format == "chat":
        return Conversation(messages=_messages(_column(row, source.messages_column), row.where))
    if source.format == "completion":
        return PlainText(prompt="", response=_text(row, source.text_column))
    response = _text(row, source.response_column)
    if source.template is None:
        prompt = _text(row, source.prompt_column)
        return Conversation(messages=[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
    try:
        prompt = source.template.format_map(_Columns(row))
    except (ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{row.where}: the template can't be filled in, {error}; write a brace that is text twice, {{{{ or }}}}"
        ) from error
    return PlainText(prompt=_encodable(prompt, row.where), response=response)


def read_prompt(text: str, source: SourceConfig) -> Conversation | PlainText:
    """A prompt from outside, in the form that the prompts of `source` have.

    A template of one column is filled in with the text; one of several takes a JSON object with a key for each.

    Raises:
        DataError: the text is not such an object.
    """
    if source.format == "completion":
        return PlainText(prompt=text, response="")
    if source.format == "chat" or source.template is None:
        return Conversation(messages=[{"role": "user", "content": text}])
    columns = {name for _, name, _, _ in string.Formatter().parse(source.template) if name}
    values: Any = {name: text for name in columns}
    if len(columns) > 1:
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise DataError(
                f"the prompt: expected a JSON object with {', '.join(sorted(columns))}, which the template of the "
                f"training data takes, found {text[:60]!r}"
            )
    row = Row(values=values, where="the prompt")
    return PlainText(prompt=source.template.format_map(_Columns(row)), response="")


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
    return _encodable(value, row.where)


def _encodable(text: str, where: str) -> str:
    """The text itself, if it can be tokenized: JSON can spell half of a character, such as `\\ud83d`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half of a character, {text[error.start]!r} at position {error.start}"
        ) from None
    return text


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: expected a list of messages, found {'an empty list' if value == [] else kind(value)}"
        )
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f'{where}: expected message {index} to be an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise DataError(
                f"{where}: expected the role of message {index} to be one of {', '.join(ROLES)}, "
                f"found {message['role']!r}"
            )
        more = {key: value for key, value in message.items() if value is not None}  # Parquet fills gaps with null
        messages.append({**more, "content": _encodable(_content(message["content"], where, index), where)})
    return messages


def _content(content: Any, where: str, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise DataError(f"{where}: expected the content of message {index} to be text, found {kind(content)}")
