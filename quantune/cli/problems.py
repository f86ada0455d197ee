"""Problems of a recipe as a terminal shows them: the place, the line with what is wrong underlined, the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from rich.cells import cell_len
from rich.text import Text

from quantune.backends.discovery import plain
from quantune.errors import Place, Problem

TAB = 4
LEAST_WIDTH = 20
"""A line is not cut to less than that, however narrow the terminal."""
LONGEST_MESSAGE = 4000
LONGEST_PATH = 120


def render(problem: Problem, width: int) -> Text:
    """The problem as lines, those of the recipe cut to a terminal of `width` cells.

    recipe.toml:14:1 [adapter.alpa] unknown key "alpa"  QT012
       14 | alpa = 32
          | ^^^^
          = did you mean "alpha"?
    """
    parts = (problem.origin, problem.line, problem.column)
    place = ":".join(str(part) for part in parts if part is not None)
    head = Text.assemble(
        (_plain(place), "bold"), " ", (f"[{plain(problem.where, LONGEST_PATH)}]", "cyan"), " ", _plain(problem.message)
    )
    lines = [head.append("  ").append(problem.code, "dim")]
    lines += _excerpt(problem, "^", "bold red", width)
    for other in problem.related:
        lines += _excerpt(other, "-", "bold blue", width, other.label)
    if problem.hint:
        bar = "      = " if len(lines) > 1 else "      "
        lines.append(Text.assemble((bar, "dim"), (_plain(problem.hint), "green")))
    return Text("\n").join(lines)


def as_dict(problem: Problem) -> dict[str, Any]:
    """The problem as JSON can hold it."""
    return attrs.asdict(problem)


def visible(source_line: str, column: int, length: int, width: int) -> tuple[str, int, int]:
    """A line as a terminal shows it, at most `width` cells of it around what is underlined.

    Args:
        column: where the underline begins, in characters from 1.
        length: in characters.

    Returns:
        the text, the cells before the underline, and the cells under it, at least one.
    """
    shown, starts = "", []
    for char in source_line:
        starts.append(len(shown))
        shown += " " * (TAB - cell_len(shown) % TAB) if char == "\t" else plain(char)
    starts += [len(shown)] * max(column + length - len(source_line), 1)
    start, end = starts[column - 1], starts[column - 1 + length]
    before, meant, after = shown[:start], shown[start:end], shown[end:]
    if cell_len(shown) > width:
        meant = meant if cell_len(meant) <= width - 2 else f"{_first(meant, width - 3)}…"
        room = max(width - 2 - cell_len(meant), 0)
        left = min(cell_len(before), max(room // 2, room - cell_len(after)))
        before = before if cell_len(before) <= left else f"…{_last(before, left)}"
        after = after if cell_len(after) <= room - left else f"{_first(after, room - left)}…"
    return before + meant + after, cell_len(before), max(cell_len(meant), 1)


def _excerpt(place: Problem | Place, mark: str, style: str, width: int, label: str = "") -> Iterator[Text]:
    """A line of the recipe and what is underlined in it; what `--set` set has no line."""
    said = f" {_plain(label)}" if label else ""
    if place.line is None or place.source_line is None:
        if label:
            yield Text.assemble(("      | ", "dim"), (f"{_plain(place.origin or '')}:{said}", style))
        return
    gutter = f"{place.line:>5} | "
    if place.column is None:
        yield Text.assemble((gutter, "dim"), _plain(place.source_line))
        return
    column, length = place.underline or (place.column, 1)
    text, before, under = visible(place.source_line, column, length, max(width - len(gutter), LEAST_WIDTH))
    yield Text.assemble((gutter, "dim"), text)
    yield Text.assemble((" " * (len(gutter) - 2) + "| ", "dim"), " " * before, (mark * under + said, style))


def _plain(text: str) -> str:
    return plain(text, LONGEST_MESSAGE)


def _first(text: str, width: int) -> str:
    """As much of the beginning as fits into `width` cells."""
    text = text[:width]  # almost no character takes less than one cell
    while cell_len(text) > width:
        text = text[:-1]
    return text


def _last(text: str, width: int) -> str:
    """As much of the end as fits into `width` cells."""
    text = text[-width:] if width else ""
    while cell_len(text) > width:
        text = text[1:]
    return text
