"""What became of every key of a YAML: data, and the words for it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, get_args

import attrs

from quantune.errors import Problem

Kind = Literal["axolotl", "llamafactory", "torchtune", "unreadable"]
What = Literal["translated", "default", "dropped", "refused", "unrecognised"]
OUTCOMES: tuple[What, ...] = get_args(What)


@attrs.frozen(kw_only=True)
class Entry:
    """What became of one key."""

    key: str
    """Where it stands, e.g. `datasets[0].roles.user`."""
    outcome: What
    """`translated`: the recipe says it. `default`: it says what quantune does anyway. `dropped`: it has no place in a
    recipe, and nothing is lost without it. `refused`: quantune can't do it. `unrecognised`: no such key is known."""
    value: Any
    """Its value as PyYAML's safe loader reads it."""
    line: int
    """Line of the key, from 1."""
    column: int
    """Column of the key, from 1."""
    to: tuple[str, ...] = ()
    """The keys of the recipe it became."""
    note: str | None = None
    """Why it was dropped or refused, what it was taken for, or what changed."""
    changed: bool = False
    """Whether it was translated and does not mean exactly the same; the note says how."""

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON takes it; a date or other value that JSON lacks becomes text."""
        return {**attrs.asdict(self, recurse=False), "to": list(self.to), "value": plain(self.value)}


@attrs.frozen(kw_only=True)
class Report:
    """The account of a YAML."""

    name: str
    """The file."""
    kind: Kind
    """Which tool's YAML it was recognised as; `unreadable` where there is no YAML mapping at all."""
    entries: tuple[Entry, ...] = ()
    """One for every key of the document, by position."""
    problems: tuple[Problem, ...] = ()
    """What concerns no single key."""

    @property
    def ok(self) -> bool:
        """Whether the recipe says everything that the YAML says."""
        return not self.problems and not any(e.outcome in ("refused", "unrecognised") for e in self.entries)

    @property
    def counts(self) -> dict[What, int]:
        """How many keys had each outcome."""
        counted = Counter(entry.outcome for entry in self.entries)
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    def of(self, *outcomes: What) -> list[Entry]:
        """The entries with these outcomes."""
        return [entry for entry in self.entries if entry.outcome in outcomes]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "file": self.name,
            "kind": self.kind,
            "ok": self.ok,
            "counts": dict(self.counts),
            "entries": [entry.as_dict() for entry in self.entries],
            "problems": [attrs.asdict(problem) for problem in self.problems],
        }


def plain(value: Any) -> Any:
    """A value of YAML as JSON takes it."""
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    finite = not isinstance(value, float) or value - value == 0
    return value if isinstance(value, str | int | float | None) and finite else str(value)
