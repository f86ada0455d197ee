"""Where in a TOML text a key stands, found on the error path only, with the real parser.

A line prefix that parses and holds a key for the first time ends with the line (or the multi-line value) that set it;
the statement begins on the line after the last prefix that parsed before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tomli

Path = tuple[str | int, ...]
_COMMENT_OR_STRING = re.compile(
    r"""(?sx)
    (?P<key> \A\s*\[[^\n]*\] | (?: "(?:\\.|[^"\\\n])*" | '[^'\n]*' ) (?=[ \t]*[=.]) )
    | \"{3}(?:\\.|.)*?\"{3,5} | '{3}.*?'{3,5}
    | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | \#[^\n]*
    """
)


def locate(text: str, path: Path) -> tuple[int, int] | None:
    """Line and column, both from 1, of the key at `path`; None when the text does not set it."""
    statement = _statements(text).get(path)
    if statement is None:
        return None
    start, end = statement
    row, column = _find(lines_of(text)[start:end], path)
    return start + 1 + row, column + 1


@functools.lru_cache(maxsize=2)
def _statements(text: str) -> Mapping[Path, tuple[int, int]]:
    """Every key path of the text, with the range of lines of the statement that sets it first.

    One pass serves every problem of a recipe: parsing all prefixes anew for each took ten seconds for a hundred.
    """
    lines = lines_of(text)
    statements: dict[Path, tuple[int, int]] = {}
    start = 0
    for end in range(1, len(lines) + 1):
        document = _parse(lines[:end])
        if document is None:
            continue
        for path in _paths(document):
            statements.setdefault(path, (start, end))
        start = end
    return statements


def _paths(node: Any, prefix: Path = ()) -> Iterator[Path]:
    members = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, member in members:
        yield (*prefix, key)
        yield from _paths(member, (*prefix, key))


def lines_of(text: str) -> list[str]:
    """The lines of a TOML text; only a newline ends one, unlike for `str.splitlines`."""
    return text.replace("\r\n", "\n").split("\n")


def _parse(lines: Iterable[str]) -> dict[str, Any] | None:
    try:
        return tomli.loads("\n".join(lines) + "\n")
    except tomli.TOMLDecodeError:
        return None


def _holds(node: Any, path: Path) -> bool:
    for part in path:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _find(statement: list[str], path: Path) -> tuple[int, int]:
    """Row and column, both from 0, of the last key of `path` in the statement that sets it."""
    text, at = _masked("\n".join(statement)), None
    end = 0
    for part in _inside("\n".join(statement), path):
        if isinstance(part, int):
            end = _element(text, end, part)
            continue
        key = re.escape(part)
        found = re.compile(rf"""(?<![\w"'-])(?:"{key}"|'{key}'|{key})(?=\s*(?:=|\.|\]))""").search(text, end)
        if found:
            at, end = found.start(), found.end()
    if at is None:
        at = len(text) - len(text.lstrip())
    return text.count("\n", 0, at), at - (text.rfind("\n", 0, at) + 1)


def _inside(statement: str, path: Path) -> Path:
    """The end of `path` that the statement spells out; what comes before it stands in a table header above."""
    document = tomli.loads(statement + "\n")
    for start in range(len(path)):
        if isinstance(path[start], str) and _holds(document, path[start:]):
            return path[start:]
    return tuple(part for part in path if isinstance(part, str))[-1:]


def _masked(text: str) -> str:
    """The text with comments and string values blanked out, so that what they say is not taken for a key."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    return _COMMENT_OR_STRING.sub(lambda found: found[0] if found["key"] else blank(found), text)


def _element(text: str, start: int, index: int) -> int:
    """Where element `index` of the array after `start` begins; `start` itself after a header, which has no array."""
    opening = re.compile(r"\s*=\s*\[|\s*\[").match(text, start)
    if opening is None:
        return start
    depth, end = 0, opening.end()
    while index and end < len(text):
        depth += (text[end] in "[{") - (text[end] in "]}")
        index -= text[end] == "," and depth == 0
        end += 1
    return end
