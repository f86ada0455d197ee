"""Where in a TOML text a key stands, found on the error path only, with the real parser.

A line prefix that parses and holds a key for the first time ends with the line (or the multi-line value) that set it;
the statement begins on the line after the last prefix that parsed before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tomli

Path = tuple[str | int, ...]


def locate(text: str, path: Path) -> tuple[int, int] | None:
    """Line and column, both from 1, of the key at `path`; None when the text does not set it."""
    lines = text.splitlines()
    start = 0
    for end in range(1, len(lines) + 1):
        document = _parse(lines[:end])
        if document is None:
            continue
        if _holds(document, path):
            return start + 1 + _row(lines[start:end], path), _column(lines[start:end], path)
        start = end
    return None


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


def _row(statement: list[str], path: Path) -> int:
    """The line of the statement that names the last key: 0 unless the key is inside a multi-line value."""
    return _find(statement, path)[0]


def _column(statement: list[str], path: Path) -> int:
    return _find(statement, path)[1] + 1


def _find(statement: list[str], path: Path) -> tuple[int, int]:
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return 0, 0
    key = re.escape(names[-1])
    spellings = re.compile(rf"""(?<![\w"'-])(?:"{key}"|'{key}'|{key})(?=\s*(?:=|\.|\]))""")
    for row, line in enumerate(statement):
        found = spellings.search(line)
        if found:
            return row, found.start()
    first = next((row for row, line in enumerate(statement) if line.strip()), 0)
    return first, len(statement[first]) - len(statement[first].lstrip())
