"""Where in a TOML text a key and its value stand, found on the error path only.

The parser does not keep positions. This scanner knows the lexical grammar alone (keys, strings, brackets, comments)
and relies on the text being valid TOML, 1.0 or 1.1: whether it is, and what it means, is tomli's business.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import attrs
import tomli

Path = tuple[str | int, ...]

_BLANK = re.compile(r"[ \t]*")
_BETWEEN = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_KEY = re.compile(r""" "(?:\\.|[^"\\\n])*" | '[^'\n]*' """, re.VERBOSE)
_STRING = re.compile(
    r""" \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*' """,
    re.VERBOSE | re.DOTALL,
)
_SCALAR = re.compile(r"[^\s,\]}#]+(?: \d\d:[^\s,\]}#]+)?")  # the space is that of `1979-05-27 07:32:00`


@attrs.frozen
class Span:
    """A piece of one line."""

    line: int
    """From 1."""
    column: int
    """From 1, in characters."""
    length: int
    """In characters; of what goes on in the next line, the part in this one."""


def key_span(text: str, path: Path) -> Span | None:
    """Where the key at `path` stands, its quotes included; None when the text does not set it.

    A table is at its header, else at the first key that mentions it; an element of a list is where it begins.
    """
    mark = _marks(text).get(path)
    return None if mark is None else _span(text, *mark.key)


def value_span(text: str, path: Path) -> Span | None:
    """Where the value of the key at `path` stands; None where there is none, as for a table with a header."""
    mark = _marks(text).get(path)
    return None if mark is None or mark.value is None else _span(text, *mark.value)


def last_repeated(text: str) -> tuple[str, Span, Span] | None:
    """The name of the last key of the text that is set again, where it is set before, and where again.

    The text may end within a table's header; tomli refused what it says up to there for setting a key twice.
    """
    scanner = _Scanner(_normalized(text))
    scanner.scan()
    if scanner.repeated is None:
        return None
    name, before, again = scanner.repeated
    return name, _span(text, *before), _span(text, *again)


def lines_of(text: str) -> list[str]:
    """The lines of a TOML text; only a newline ends one, unlike for `str.splitlines`."""
    return _normalized(text).split("\n")


@attrs.frozen
class _Mark:
    """Ranges of the normalized text."""

    key: tuple[int, int]
    value: tuple[int, int] | None
    explicit: bool
    """Whether it is set here, rather than mentioned on the way to another key."""


@functools.lru_cache(maxsize=2)
def _marks(text: str) -> Mapping[Path, _Mark]:
    """Every key path of the text; one scan serves all problems of a recipe."""
    return _Scanner(_normalized(text)).scan()


def _normalized(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _span(text: str, start: int, end: int) -> Span:
    text = _normalized(text)
    begin = text.rfind("\n", 0, start) + 1
    stop = text.find("\n", start, end)
    return Span(text.count("\n", 0, start) + 1, start - begin + 1, (end if stop < 0 else stop) - start)


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.marks: dict[Path, _Mark] = {}
        self.tables: dict[Path, int] = {}
        """How many tables each array of tables has so far."""
        self.repeated: tuple[str, tuple[int, int], tuple[int, int]] | None = None
        """The last key that was marked again: its name, and both places."""

    def scan(self) -> Mapping[Path, _Mark]:
        table: Path = ()
        while self._skip(_BETWEEN) < len(self.text):
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._pair(table)
        return self.marks

    def _header(self) -> Path:
        """A `[table]` or `[[array of tables]]`; returns the path that the keys below it belong to."""
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, (last, *key) = self._key()
        self._skip(_BLANK)
        self.at += brackets
        path: Path = ()
        for name, start, end in parents:
            path = (*path, name)
            self._mark(path, (start, end))
            if path in self.tables:  # what stands below an array of tables belongs to its last one
                path = (*path, self.tables[path] - 1)
        path = (*path, last)
        if brackets == 1 or path not in self.tables:
            self._mark(path, (key[0], key[1]), explicit=True)
        if brackets == 2:
            index = self.tables.setdefault(path, 0)
            self.tables[path] += 1
            path = (*path, index)
            self._mark(path, (key[0], key[1]), explicit=True)
        return path

    def _pair(self, table: Path) -> None:
        """A `key = value`."""
        *parents, (last, *key) = self._key()
        self._skip(_BLANK)
        self.at += 1  # the equals sign
        path = table
        for name, start, end in parents:
            path = (*path, name)
            self._mark(path, (start, end))
        self._value((*path, last), (key[0], key[1]))

    def _key(self) -> list[tuple[str, int, int]]:
        """A dotted key: the name of each part, where it starts and where it ends."""
        parts = []
        while True:
            start = self._skip(_BLANK)
            quoted = _QUOTED_KEY.match(self.text, start)
            found = quoted or _BARE_KEY.match(self.text, start)
            assert found is not None, "the text is not valid TOML"
            name = next(iter(tomli.loads(f"{found[0]} = 0"))) if quoted else found[0]
            self.at = found.end()
            parts.append((name, start, self.at))
            if not self.text.startswith(".", self._skip(_BLANK)):
                return parts
            self.at += 1

    def _value(self, path: Path, key: tuple[int, int] | None) -> None:
        """A value; an element of a list has no `key` and is found by itself."""
        start = self._skip(_BLANK)
        if self.text[start] in "[{":
            array = self.text[start] == "["
            closing, index = "]" if array else "}", 0
            self.at += 1
            while self.text[self._skip(_BETWEEN)] != closing:
                if self.text[self.at] == ",":
                    self.at += 1
                elif array:
                    self._value((*path, index), None)
                    index += 1
                else:
                    self._pair(path)
            self.at += 1
        else:
            found = _STRING.match(self.text, start) or _SCALAR.match(self.text, start)
            assert found is not None, "the text is not valid TOML"
            self.at = found.end()
        value = (start, self.at)
        self._mark(path, key or value, value, explicit=True)

    def _mark(
        self, path: Path, key: tuple[int, int], value: tuple[int, int] | None = None, *, explicit: bool = False
    ) -> None:
        """Note where a path is set; as long as it isn't, where it is first mentioned."""
        known = self.marks.get(path)
        if known is not None and (explicit or known.value is not None):
            self.repeated = str(path[-1]), known.key, key
        if known is None or (explicit and not known.explicit):
            self.marks[path] = _Mark(key, value, explicit)

    def _skip(self, what: re.Pattern[str]) -> int:
        """Move past `what`, which may be nothing, and say where that is."""
        found = what.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return self.at
