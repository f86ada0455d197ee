"""The recipe as TOML that reads as if written by hand: what each value was called, and what there is to know."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import attrs
import tomlkit

import quantune
from quantune.recipe.migrate.reading import Path, key_text
from quantune.recipe.migrate.report import Entry, Report
from quantune.recipe.migrate.rule import RecipePath
from quantune.recipe.migrate.schema_order import order_of

WIDTH = 100
"""Columns that comments of their own line fill."""
LONGEST_LINE = 110
"""Columns up to which a list stays on one line."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


@attrs.frozen(kw_only=True)
class Line:
    """What is said about one key of the recipe."""

    keys: tuple[Path, ...] = ()
    """The keys of the YAML that it came from."""
    notes: tuple[str, ...] = ()
    """What is to be known about it."""
    said: str | None = None
    """What stands behind it in place of the keys."""
    value: Any = None
    """Its value."""


def to_toml(document: dict[str, Any], lines: dict[RecipePath, Line], report: Report) -> str:
    """The recipe with its comments, in the canonical order."""
    made = tomlkit.document()
    for text in _head(report):
        made.add(tomlkit.comment(text) if text else tomlkit.nl())
    for name in _ordered(document, ()):
        if name == "data":
            _add_data(made, document[name], lines)
        else:
            made.add(tomlkit.nl())
            made.add(name, _table(document[name], (name,), lines))
    text = tomlkit.dumps(made).rstrip("\n")
    tail = "\n".join(f"# {line}".rstrip() for line in _left_out(report))
    return f"{text}\n\n{tail}\n" if tail else f"{text}\n"


def shown(value: Any, longest: int = 60) -> str:
    """A key or value on one line, without control characters."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value))
    return text if len(text) <= longest else f"{text[:longest]}..."


def _head(report: Report) -> list[str]:
    head = [f"From {shown(report.name)}, by quantune migrate {quantune.__version__}."]
    refused = report.of("refused", "unrecognised")
    if refused or report.problems:
        head += ["", "NOT TRANSLATED; the recipe is not what the YAML was:"]
        for entry in refused:
            head += _wrapped(f"- {shown(entry.key)}: {_why(entry)}")
        for problem in report.problems:
            head += _wrapped(f"- {shown(problem.message, 200)}")
    return head


def _why(entry: Entry) -> str:
    note = shown(entry.note, 400) if entry.note else ""
    return note if entry.outcome == "refused" else f"not a known key{'; ' + note if note else ''}"


def _left_out(report: Report) -> list[str]:
    """The keys that nothing was written for, with the reasons, those with the same one together."""
    silent = [entry for entry in (*report.of("dropped"), *report.of("translated")) if not entry.to]
    lines: list[str] = []
    for heading, entries in (
        ("Not written, and not quite what it is here:", [entry for entry in silent if entry.changed]),
        ("Left out, because a recipe needs none of it:", [entry for entry in silent if not entry.changed]),
    ):
        by_reason: dict[str, list[str]] = {}
        for entry in entries:
            by_reason.setdefault(entry.note or "", []).append(shown(entry.key))
        lines += [heading] if by_reason else []
        for reason, keys in by_reason.items():
            lines += _wrapped(f"- {', '.join(keys)}: {shown(reason, 400)}")
    return lines


def _wrapped(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, WIDTH - 2, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _ordered(table: dict[str, Any], path: tuple[str | int, ...]) -> list[str]:
    """The keys of a table: those of its class in their order, then the others as they come; tables go last."""
    order = {name: place for place, name in enumerate(order_of(path))}
    names = sorted(table, key=lambda name: order.get(name, len(order)))
    return sorted(names, key=lambda name: isinstance(table[name], dict))


def _table(values: dict[str, Any], path: tuple[str | int, ...], lines: dict[RecipePath, Line]) -> Any:
    table = tomlkit.table()
    _fill(table, values, path, lines)
    return table


def _fill(table: Any, values: dict[str, Any], path: tuple[str | int, ...], lines: dict[RecipePath, Line]) -> None:
    written = []
    for name in _ordered(values, path):
        value, here = values[name], (*path, name)
        line = lines.get(here)
        for note in line.notes if line else ():
            for text in _wrapped(shown(note, 400)):
                table.add(tomlkit.comment(text))
        if isinstance(value, dict) and line is None and len(path) == 1:
            table.add(tomlkit.nl())
            table.add(name, _table(value, here, lines))
            continue
        item, comment = _item(value, len(name)), _called(line, name)
        length = len(f"{name} = {item.as_string()}")
        if comment and (length + len(comment) > LONGEST_LINE or isinstance(value, dict)):
            for text in _wrapped(comment):
                table.add(tomlkit.comment(text))
        elif comment:
            written.append((item, length, comment))
        table.add(name, item)
    _align(written)


def _align(written: Iterable[tuple[Any, int, str]]) -> None:
    """Put the comments behind values into one column, as far as the values are short."""
    rows = list(written)
    column = max((length for _, length, _ in rows if length <= 48), default=0)
    for item, length, comment in rows:
        item.comment(comment)
        item.trivia.comment_ws = " " * max(2, column + 2 - length)


def _called(line: Line | None, name: str) -> str | None:
    """What a value was called, where that is not what it is called now."""
    if line is None:
        return None
    if line.said:
        return line.said
    names = list(dict.fromkeys(shown(_short(key)) for key in line.keys))
    return None if [one.rpartition(".")[2] for one in names] == [name] else f"was: {', '.join(names)}"


def _short(path: Path) -> str:
    """The key in its dataset, or the whole one."""
    return key_text(path[2:] if path[0] in ("datasets", "test_datasets") and len(path) > 2 else path)


def _item(value: Any, indent: int) -> Any:
    if isinstance(value, dict):
        table = tomlkit.inline_table()
        table.update({key: _item(member, indent) for key, member in value.items()})
        return table
    item = tomlkit.item(value)
    if isinstance(value, list) and indent + 3 + len(item.as_string()) > LONGEST_LINE:
        item.multiline(True)
    return item


def _add_data(made: Any, values: dict[str, Any], lines: dict[RecipePath, Line]) -> None:
    """`[data]` and its arrays of tables, which tomlkit wants to have apart."""
    rest = {key: value for key, value in values.items() if key not in ("train", "eval")}
    data = tomlkit.table(is_super_table=not rest)
    _fill(data, rest, ("data",), lines)
    for part in ("train", "eval"):
        if part not in values:
            continue
        array = tomlkit.aot()
        for index, source in enumerate(values[part]):
            table = tomlkit.table()
            _fill(table, source, ("data", part, index), lines)
            array.append(table)
        data.add(tomlkit.nl())
        data.add(part, array)
    made.add(tomlkit.nl())
    made.add("data", data)
