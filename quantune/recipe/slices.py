"""Splits and slices of a source's rows: `train`, `train[:20%]`, `train[100:200]`, `train[-50:]`.

The notation and its meaning are those of the datasets library: percents are rounded to the closest row.
"""

from __future__ import annotations

import re

import attrs

_SPLIT = re.compile(r"(?P<name>[^\[\]+]+?)(\[(?P<begin>-?\d+(_\d+)*%?)?:(?P<end>-?\d+(_\d+)*%?)?\])?")
_ROUNDING = re.compile(r"\([^()]*\)\s*$")


@attrs.frozen(kw_only=True)
class Split:
    """A named split, or a slice of it."""

    name: str
    """E.g. `train`."""
    begin: int | None = None
    """The first row, or how many percent of the rows come before it; from the end when negative; None: all from the
    start."""
    end: int | None = None
    """As `begin`, for the row after the last; None: all to the end."""
    percent: bool = False
    """Whether `begin` and `end` are percents."""

    @property
    def whole(self) -> bool:
        """Whether it is all rows."""
        return self.begin is None and self.end is None

    @property
    def needs_count(self) -> bool:
        """Whether the rows it holds depend on how many there are."""
        return self.percent or any(bound is not None and bound < 0 for bound in (self.begin, self.end))

    def bounds(self, count: int) -> tuple[int, int]:
        """The first row and the row after the last, of `count` rows."""

        def place(bound: int | None, default: int) -> int:
            if bound is None:
                return default
            rows = round(bound * count / 100) if self.percent else bound
            return min(max(rows + count, 0) if rows < 0 else rows, count)

        return place(self.begin, 0), place(self.end, count)


def parse_split(text: str) -> Split:
    """The split that `text` names.

    Raises:
        ValueError: it is not in this notation; with a sentence that says why.
    """
    found = _SPLIT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"expected a split such as train[:20%] or train[100:200], found {text!r}")
    bounds = [found["begin"], found["end"]]
    given = [bound for bound in bounds if bound is not None]
    percent = [bound.endswith("%") for bound in given]
    if any(percent) and not all(percent):
        raise ValueError(f"expected rows or percents, found both in {text!r}")
    begin, end = (None if bound is None else int(bound.rstrip("%")) for bound in bounds)
    if any(percent) and any(abs(bound) > 100 for bound in (begin, end) if bound is not None):
        raise ValueError(f"expected at most 100%, found {text!r}")
    return Split(name=found["name"].strip(), begin=begin, end=end, percent=any(percent))


def parse_sum(text: str) -> list[Split]:
    """The splits of a dataset of the hub that `text` adds up, `train[:20%]+test`; how each rounds is left to the hub.

    Raises:
        ValueError: as `parse_split`.
    """
    return [parse_split(_ROUNDING.sub("", part)) for part in text.split("+")]
