"""Random TOML documents together with where each of their keys and values stands: whoever writes the text knows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

Place = tuple[int, int, int]
"""Line and column, from 1, and length."""

NAMES = (
    *("r", "lr", "rl", "r2", "data", "train", "path", "true", "nan", "1", "-", "_", "1979-05-27", "0x1F"),
    *("", " ", "a b", "a.b", "r = 1", "[data]", "[[data.train]]", "# r", "'", '"', '"r"', "\\", "\t", '"""', "'''"),
    *("ü", "größe", "日本", "🙂", "e\u0301", "\u2028", "\x7f", "{r = 1}", "]", "}", ",", "="),
)
SCALARS = (
    *("1", "-0.5", "+1e-3", "1_000", "0xff", "inf", "-nan", "true", "1979-05-27", "07:32:00", "1979-05-27 07:32:00"),
    *('""', "''", '"r = 1"', "'[data]'", '"# no comment"', "'# r'", '"\\"r\\" = 1"', '"\\\\"', "'\\'", '"日本 = 🙂"'),
    *('"""r = 1"""', "''''r' = 1'''", '"""\nr = 1\n[data]\n"""', "'''\n[[data.train]]\npath = 1'''", '"""\\\n  r"""'),
    *('""""r" = 1"""""', "'''r''''", '"""\\"""r = 1"""', '""""""', "''''''", '"""a""b\n# r = 1\n"""', "'''\n'''"),
)
COMMENTS = ("# r = 1", "#", "# [data]", '# """', "# '", "# 日本\tr = 2", "# ]}")


class Document:
    """Writes one document; `keys` and `values` say where everything stands, as (line, column, length)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.text = ""
        self.mentioned: dict[tuple, Place] = {}
        self.defined: dict[tuple, Place] = {}
        self.values: dict[tuple, Place] = {}
        self.dotted: dict[tuple, list[tuple]] = {}
        """The tables that dotted keys made, by the table they stand in."""
        self.headers: list[tuple] = [()]
        """What a later header can stand below."""
        self.without_header: set[tuple] = set()
        """Tables that only the headers below them made, so far."""
        self._body(())
        for _ in range(self.random.randrange(5)):
            self._header()
        if self.random.random() < 0.3:
            self.text = self.text.rstrip("\n")
        if self.random.random() < 0.3:
            self.text = self.text.replace("\n", "\r\n")
        if self.random.random() < 0.1:
            self.text = "\ufeff" + self.text

    @property
    def keys(self) -> dict[tuple, Place]:
        """A table stands at its header, and without one where it is first mentioned."""
        return {**self.mentioned, **self.defined}

    # Tables

    def _header(self) -> None:
        arrays = [path[:-1] for path in self.headers if path and isinstance(path[-1], int)]
        choice = self.random.random()
        if choice < 0.3 and arrays:  # one more table of an array
            path, array = self.random.choice(arrays), True
        elif choice < 0.5 and self.without_header:
            path, array = self.random.choice(sorted(self.without_header, key=str)), False
        else:
            path, array = self.random.choice(self.headers), self.random.random() < 0.4
            for _ in range(self.random.choice((1, 1, 2, 3))):
                path = self._new(path)
        self.text += "[[" if array else "["
        self._maybe(" ")
        for length in range(1, len(path) + 1):
            if isinstance(path[length - 1], int):
                continue
            part = path[:length]
            place = self._name(str(part[-1]))
            if part == path:
                self.defined.setdefault(part, place)
            else:
                if part not in self.keys:
                    self.without_header.add(part)
                    self.headers.append(part)
                self.mentioned.setdefault(part, place)
                self._dot()
        self._maybe(" ")
        self.text += "]]" if array else "]"
        self.without_header.discard(path)
        if array:  # the tables below the one before are out of reach now
            index = sum(known[:-1] == path and isinstance(known[-1], int) for known in self.defined if known)
            self.headers = [known for known in self.headers if known[: len(path)] != path]
            self.without_header = {known for known in self.without_header if known[: len(path)] != path}
            path = (*path, index)
            self.defined[path] = place
        if path not in self.headers:
            self.headers.append(path)
        self._end()
        self._body(path)

    def _body(self, table: tuple) -> None:
        self._lines()
        for _ in range(self.random.randrange(5)):
            self._pair(table)
            self._end()
            self._lines()

    def _pair(self, table: tuple, depth: int = 0) -> None:
        """`a.b = value`; the tables on the way are new, or made by another dotted key beside it."""
        path = table
        if self.dotted.get(table) and self.random.random() < 0.3:
            path = self.random.choice(self.dotted[table])
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            path = self._new(path)
        for length in range(len(table) + 1, len(path)):
            part = path[:length]
            if part not in self.mentioned:
                self.dotted.setdefault(table, []).append(part)
            self.mentioned.setdefault(part, self._name(part[-1]))
            self._dot()
        self.defined[path] = self._name(path[-1])
        self._maybe(" ", "\t")
        self.text += "="
        self._maybe(" ", "  ")
        self._value(path, depth)

    def _value(self, path: tuple, depth: int) -> None:
        start = len(self.text)
        kind = self.random.random() if depth < 3 else 1.0
        if kind < 0.2:
            self.text += "{"
            self._items(path, depth, "}", lambda index: self._pair(path, depth + 1))
        elif kind < 0.4:
            self.text += "["
            self._items(path, depth, "]", lambda index: self._element((*path, index), depth + 1))
        else:
            self.text += self.random.choice(SCALARS)
        self.values[path] = self._place(start)

    def _items(self, path: tuple, depth: int, closing: str, item: Callable[[int], None]) -> None:
        """What stands between brackets; only lists may go over several lines."""
        space = self._lines if closing == "]" else lambda: self._maybe(" ")
        count = self.random.randrange(4)
        for index in range(count):
            space()
            item(index)
            space()
            if index < count - 1 or (closing == "]" and self.random.random() < 0.3):
                self.text += ","
        space()
        self.text += closing

    def _element(self, path: tuple, depth: int) -> None:
        self._value(path, depth)
        self.defined[path] = self.values[path]

    # Pieces of text

    def _place(self, start: int) -> Place:
        """The place of what was written from `start` on; of several lines, of the first."""
        line_start = self.text.rfind("\n", 0, start) + 1
        length = len(self.text[start:].split("\n")[0])
        return self.text.count("\n", 0, start) + 1, start - line_start + 1, length

    def _name(self, name: str) -> Place:
        """Write one part of a key in one of its spellings."""
        escaped = "".join(f"\\u{ord(char):04X}" if ord(char) < 1 << 16 else f"\\U{ord(char):08X}" for char in name)
        spellings = [f'"{escaped}"', json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007F")]
        if not re.search(r"['\x7f]", name):
            spellings.append(f"'{name}'")
        if re.fullmatch(r"[A-Za-z0-9_-]+", name):
            spellings += [name] * 5
        start = len(self.text)
        self.text += self.random.choice(spellings)
        return self._place(start)

    def _new(self, table: tuple) -> tuple:
        """A path in `table` that nothing has set or mentioned."""
        return self.random.choice([(*table, name) for name in NAMES if (*table, name) not in self.keys])

    def _dot(self) -> None:
        self._maybe(" ")
        self.text += "."
        self._maybe(" ")

    def _end(self) -> None:
        self._maybe(" ", "\t", " " + self.random.choice(COMMENTS))
        self.text += "\n"

    def _lines(self) -> None:
        """Blank lines and comments, where a newline may stand."""
        for _ in range(self.random.randrange(3)):
            self._maybe(" ", "\t", self.random.choice(COMMENTS))
            self.text += "\n"
        self._maybe(" ", "\t  ")

    def _maybe(self, *texts: str) -> None:
        self.text += self.random.choice(("", *texts))
