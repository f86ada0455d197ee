"""The messages of a row, with the keys and roles that chat templates know."""

from __future__ import annotations

from typing import Any

from quantune.data.sources import kind
from quantune.errors import DataError
from quantune.recipe.schema import ROLES, SourceConfig


def read_messages(value: Any, source: SourceConfig, where: str) -> list[dict[str, Any]]:
    """The messages that `value` holds: at least one, each with a role of ROLES, text as content, and what else it has.

    Raises:
        DataError: it is no list of messages, or the messages are not what `source` says they are.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: expected a list of messages, found {'an empty list' if value == [] else kind(value)}"
        )
    names = {"role": "role", "content": "content", **source.message_keys}
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {names["role"], names["content"]} <= message.keys():
            found = f", found {_listed(message)}" if isinstance(message, dict) and message else ""
            raise DataError(
                f'{where}: expected message {index} to be an object with "{names["role"]}" and "{names["content"]}"'
                f"{found}"
            )
        renamed = _renamed(message, names)
        content = encodable(_content(renamed["content"], where, index), where)
        messages.append({**renamed, "role": _role(renamed["role"], source, where, index), "content": content})
    if source.drop_system_message and messages[0]["role"] == "system":
        messages = messages[1:]
        if not messages:
            raise DataError(f"{where}: expected messages beside the system message, which is dropped, found none")
    return messages


def encodable(text: str, where: str) -> str:
    """The text itself, if it can be tokenized: JSON can spell half of a character, such as `\\ud83d`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half of a character, {text[error.start]!r} at position {error.start}"
        ) from None
    return text


def _renamed(message: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The message under the keys that templates know, nulls left out: Parquet fills gaps with them."""
    named = {key: message.get(name) for key, name in names.items()}
    others = {key: value for key, value in message.items() if key not in names and key not in names.values()}
    more = {key: value for key, value in {**others, **named}.items() if value is not None}
    return {**more, "role": named["role"], "content": named["content"]}


def _role(name: Any, source: SourceConfig, where: str, index: int) -> str:
    for role in ROLES:
        if name == role or name in source.roles.get(role, ()):
            return role
    known = [role + "".join(f" ({also})" for also in source.roles.get(role, ())) for role in ROLES]
    example = "user" if str(name).lower() in ("human", "prompter", "customer") else "assistant"
    raise DataError(
        f"{where}: expected the role of message {index} to be one of {', '.join(known)}, found {name!r}; "
        f'say which one it is, e.g. roles = {{{example} = ["{name}"]}}'
    )


def _content(content: Any, where: str, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise DataError(f"{where}: expected the content of message {index} to be text, found {kind(content)}")


def _listed(message: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in message)
