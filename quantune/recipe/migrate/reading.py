"""YAML as PyYAML's safe loader reads it (YAML 1.1), with the position of every key, duplicates, and limits.

`2e-5` is a string there, `no` is False and `1:30` is 90. The text is composed into nodes, which know where they stand,
then measured with every alias expanded, and only then built into values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import attrs
import yaml

LARGEST = 1 << 20
"""Bytes of a text."""
DEEPEST = 100
"""Levels of nesting."""
MOST_NODES = 100_000
"""Nodes once every alias is expanded."""
MOST_KEYS = 1000
"""Keys of one mapping, those merged into it included."""

Path = tuple[Any, ...]
"""Keys of mappings, as they were read, and indexes of lists."""
Position = tuple[int, int]
"""Line and column, both from 1."""

_MERGE, _VALUE, _TEXT, _MAP, _SEQUENCE = (
    f"tag:yaml.org,2002:{name}" for name in ("merge", "value", "str", "map", "seq")
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SCALAR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError)
"""What PyYAML's constructors raise for a scalar that is not what its tag says, e.g. the date 2024-13-45."""


class Unreadable(Exception):
    """The text is no YAML that can be used; says why, and where when that is known."""

    def __init__(self, message: str, position: Position | None = None) -> None:
        self.message, self.position = message, position
        super().__init__(message)


@attrs.frozen(kw_only=True)
class Document:
    """A YAML mapping with the places of its keys."""

    values: dict[Any, Any]
    """What the safe loader makes of it."""
    positions: dict[Path, Position]
    """Where each key and list element stands."""
    duplicates: tuple[tuple[Path, Position, Position], ...] = ()
    """Keys that a mapping has twice, with the places of both; the second one is the value."""


def read(text: str) -> Document:
    """Read a YAML text.

    Raises:
        Unreadable: it is not YAML, not a mapping, over a limit, or has tags that make objects.
    """
    if len(text.encode("utf-8", "surrogatepass")) > LARGEST:
        raise Unreadable(f"expected at most {LARGEST >> 20} MiB of text")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise _unreadable(error) from None
    except (ValueError, OverflowError):  # of chr(), for "\U00110000"
        place = loader.get_mark()
        raise Unreadable(
            "expected text, found a character beyond U+10FFFF", (place.line + 1, place.column + 1)
        ) from None
    if not isinstance(node, yaml.MappingNode):
        found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(node), "nothing")
        raise Unreadable(f"expected keys with values, found {found}")
    if _size(node, {}, set()) > MOST_NODES:
        raise Unreadable(f"expected at most {MOST_NODES:,} values once every alias is expanded")
    builder = _Builder(loader)
    values = builder.build(node, ())
    if not isinstance(values, dict):
        raise Unreadable("expected keys with values, found a set", _position(node))
    return Document(values=values, positions=builder.positions, duplicates=tuple(builder.duplicates))


def leaf_keys(document: dict[Any, Any]) -> list[str]:
    """The keys of a document: its leaves, written as `datasets[0].message_property_mappings.role`.

    A leaf is whatever is no mapping and no list, an empty mapping or list, or a list in which no mapping stands: such a
    list is one leaf under its key. A list in which mappings stand is walked by index.
    """
    return [key_text(path) for path, _ in leaves(document)]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The path and value of every leaf, in the order of the document; see `leaf_keys`."""
    if isinstance(value, dict) and (value or not path):
        for key, member in value.items():
            yield from leaves(member, (*path, key))
    elif isinstance(value, list) and _holds_mapping(value):
        for index, member in enumerate(value):
            yield from leaves(member, (*path, _Index(index)))
    else:
        yield path, value


def key_text(path: Path) -> str:
    """The path as the report writes it."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, _Index) else f".{part}"
    return text[1:]


class _Index(int):
    """An index of a list, told apart from a key that is a whole number."""


def _holds_mapping(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(member, dict) or _holds_mapping(member) for member in value)
    return False


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what is nested too deeply before Python does."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _size(node: Any, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Nodes below and with this one, aliases expanded."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in open_nodes:
        raise Unreadable("an alias stands inside what it stands for", _position(node))
    if id(node) not in sizes:
        open_nodes.add(id(node))
        members = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        sizes[id(node)] = 1 + sum(_size(member, sizes, open_nodes) for member in members)
        open_nodes.discard(id(node))
    return sizes[id(node)]


class _Builder:
    """Builds values from nodes, and keeps where each stands."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.positions: dict[Path, Position] = {}
        self.duplicates: list[tuple[Path, Position, Position]] = []
        self._looked_at: set[int] = set()

    def build(self, node: Any, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            values = []
            for index, member in enumerate(node.value):
                step = (*path, _Index(index))
                self.positions[step] = _position(member)
                values.append(self.build(member, step))
            return values
        return self._construct(node)

    def _mapping(self, node: Any, path: Path) -> dict[Any, Any]:
        if id(node) not in self._looked_at:  # flattening puts merged pairs among its own
            self._looked_at.add(id(node))
            self._find_duplicates(node, path)
            try:
                self.loader.flatten_mapping(node)
            except yaml.YAMLError as error:
                raise _unreadable(error) from None
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            self.positions[(*path, key)] = _position(key_node)
            values[key] = self.build(value_node, (*path, key))
        if len(values) > MOST_KEYS:
            raise Unreadable(
                f"expected at most {MOST_KEYS:,} keys in a mapping, found {len(values):,}", _position(node)
            )
        return values

    def _find_duplicates(self, node: Any, path: Path) -> None:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            if key_node.tag == _VALUE:  # a key `=`, which flattening takes for text, too late for this
                key_node.tag = _TEXT
            key = self._key(key_node)
            if key in seen:
                self.duplicates.append(((*path, key), _position(seen[key]), _position(key_node)))
            seen[key] = key_node

    def _key(self, node: Any) -> Any:
        key = self._construct(node)
        try:
            hash(key)
        except TypeError:
            raise Unreadable(
                "expected a name or a number as a key, found a list or a mapping", _position(node)
            ) from None
        return key

    def _construct(self, node: Any) -> Any:
        try:
            value = self.loader.construct_object(node, deep=True)
            if not isinstance(value, str):
                repr(value)  # which Python refuses for a number of more than 4300 digits, and so for all reports of it
        except yaml.YAMLError as error:
            raise _unreadable(error) from None
        except _SCALAR_ERRORS:
            kind = node.tag.rpartition(":")[2]
            raise Unreadable(f"expected a value of the kind {kind}, found something else", _position(node)) from None
        if isinstance(value, str) and _SURROGATE.search(value):
            raise Unreadable("expected text, found half of a character", _position(node))
        return value


def _position(node: Any) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _unreadable(error: yaml.YAMLError) -> Unreadable:
    """The error in one sentence, with its place."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = (mark.line + 1, mark.column + 1) if mark is not None else None
    if isinstance(error, yaml.reader.ReaderError):
        return Unreadable(f"expected text, found the character U+{_code_point(error):04X}")
    problem = getattr(error, "problem", None) or "not valid YAML"
    if "could not determine a constructor for the tag" in problem:
        tag = problem.rpartition("tag ")[2]
        return Unreadable(f"expected plain values, found {tag}: tags that make objects are not read", position)
    context = getattr(error, "context", None)
    return Unreadable(f"not valid YAML {context}: {problem}" if context else problem, position)


def _code_point(error: Any) -> int:
    return ord(error.character) if isinstance(error.character, str) else int(error.character)
