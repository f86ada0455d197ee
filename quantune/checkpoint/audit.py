"""Whether the history of a run is that of a run in which nothing was lost, repeated or mixed up.

An attempt that goes on from a checkpoint takes the run back to the step of that checkpoint, and what was done after it
does not survive. The history is sound if every attempt went on from a checkpoint that was committed, every step is the
one after what survives, and has the samples that the order of the data gives to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from quantune.data.order import step_indices

ORDER = ("batch_size", "samples", "seed", "shuffle")
"""What the order of samples is a function of."""


@attrs.frozen(kw_only=True)
class Attempt:
    """One process's, or world's, work on a run."""

    number: int
    """From 1."""
    processes: int
    """The world size."""
    host: str
    """Where rank 0 ran."""
    resumed: int | None
    """The step it went on from; None for one that began the run."""
    last: int
    """The last step it did, or the one it went on from."""
    checkpoints: tuple[int, ...]
    """Steps whose checkpoints it committed."""
    passed_over: tuple[str, ...]
    """A sentence on each later checkpoint, which it found damaged."""
    end: str
    """`finished`, `interrupted`, or `died` (or goes on)."""


@attrs.frozen(kw_only=True)
class Verdict:
    """What a history says."""

    attempts: tuple[Attempt, ...]
    """In order."""
    steps: int
    """Steps that survive: each done once, in order, with its samples, if there is no problem."""
    total: int | None
    """Steps of the whole run."""
    done_again: int
    """Steps that were lost with an attempt and done again."""
    problems: tuple[str, ...]
    """A sentence on each thing that a sound run does not do."""

    @property
    def sound(self) -> bool:
        """Whether every surviving step happened exactly once, in order, with its samples."""
        return not self.problems


def audit(rows: Iterable[Mapping[str, Any]]) -> Verdict:
    """Read a history, given as its events, see `quantune.checkpoint.history`."""
    auditor = _Auditor()
    for number, row in enumerate(rows, start=1):
        try:
            auditor.take(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            auditor.problems.append(f"event {number} ({row.get('event')}) lacks what such an event has: {error!r}")
    if not auditor.attempts:
        auditor.problems.append("there is no attempt in it")
    return auditor.verdict()


@attrs.define
class _Auditor:
    problems: list[str] = attrs.field(factory=list)
    attempts: list[dict[str, Any]] = attrs.field(factory=list)
    surviving: int = 0
    """The last step that survives, as do all before it."""
    saving: int | None = None
    """The step whose state was captured and is being written."""
    committed: set[int] = attrs.field(factory=set)
    """Steps that survive and whose checkpoint is committed."""
    digests: dict[tuple[int, ...], str] = attrs.field(factory=dict)
    """By the indices of samples."""
    order: dict[str, Any] | None = None
    total: int | None = None
    done: int = 0
    """Steps in all."""
    closed: str | None = None
    """The event that ended the attempt."""

    def take(self, row: Mapping[str, Any]) -> None:
        event = row["event"]
        if event == "attempt":
            self._attempt(row)
        elif not self.attempts:
            self.problems.append(f"{_event(row)} comes before any attempt")
        elif self.closed is not None:
            self.problems.append(f"{_event(row)} comes after attempt {self._number} had {self.closed}")
        else:
            handler = {
                "step": self._step,
                "saving": self._saving,
                "checkpoint": self._checkpoint,
                "fallback": self._fallback,
                "evaluation": self._at_step,
                "interrupted": self._end,
                "finished": self._end,
            }.get(event)
            if handler is None:
                self.problems.append(f"{event!r} is no event of a run")
            else:
                handler(row)

    def verdict(self) -> Verdict:
        return Verdict(
            attempts=tuple(
                Attempt(**{**a, "checkpoints": tuple(a["checkpoints"]), "passed_over": tuple(a["passed_over"])})
                for a in self.attempts
            ),
            steps=self.surviving,
            total=self.total,
            done_again=self.done - self.surviving,
            problems=tuple(self.problems),
        )

    @property
    def _number(self) -> int:
        return len(self.attempts)

    def _attempt(self, row: Mapping[str, Any]) -> None:
        self.closed = None
        resumed = row["resumed"]
        if row["number"] != self._number + 1:
            self.problems.append(f"attempt {row['number']} follows attempt {self._number}")
        order = {key: row[key] for key in ORDER}
        if self.order is not None and order != self.order:
            self.problems.append(f"attempt {row['number']} has another order of samples: {order}, it was {self.order}")
        self.order, self.total = order, row["steps"]
        # the attempt before may have died between committing a checkpoint and saying so
        if resumed is not None and resumed not in self.committed | {self.saving}:
            self.problems.append(
                f"attempt {row['number']} went on from step {resumed}, of which no checkpoint was committed"
            )
        self.surviving, self.saving = resumed or 0, None
        self.committed = {step for step in (*self.committed, self.surviving) if step <= self.surviving}
        attempt = {key: row[key] for key in ("number", "processes", "host", "resumed")}
        self.attempts.append(attempt | {"last": resumed or 0, "checkpoints": [], "passed_over": [], "end": "died"})

    def _step(self, row: Mapping[str, Any]) -> None:
        step, samples = row["step"], row["samples"]
        expected = self.surviving + 1
        if step != expected:
            self.problems.append(f"expected step {expected} in attempt {self._number}, found step {step}")
        assert self.order is not None
        order = self.order
        right = step_indices(step - 1, order["batch_size"], order["samples"], order["seed"], order["shuffle"])
        if samples != right:
            self.problems.append(f"step {step} of attempt {self._number} had samples {samples}, expected {right}")
        known = self.digests.setdefault(tuple(samples), row["digest"])
        if known != row["digest"]:
            self.problems.append(f"the samples of step {step} of attempt {self._number} are not what they were")
        self.surviving = step
        self.done += 1
        self.attempts[-1]["last"] = step

    def _saving(self, row: Mapping[str, Any]) -> None:
        if self._at_step(row):
            self.saving = row["step"]

    def _checkpoint(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        if step != self.saving:
            self.problems.append(f"the checkpoint of step {step} was committed, and its state was not being written")
            return
        self.saving = None
        self.committed.add(step)
        self.attempts[-1]["checkpoints"].append(step)

    def _fallback(self, row: Mapping[str, Any]) -> None:
        self.attempts[-1]["passed_over"].append(row["reason"])

    def _at_step(self, row: Mapping[str, Any]) -> bool:
        here = row["step"] == self.surviving
        if not here:
            self.problems.append(f"{_event(row)} comes after step {self.surviving}")
        return here

    def _end(self, row: Mapping[str, Any]) -> None:
        self._at_step(row)
        self.closed = self.attempts[-1]["end"] = row["event"]
        if row["event"] == "finished" and row["step"] != self.total:
            self.problems.append(f"the run finished after step {row['step']} of {self.total}")


def _event(row: Mapping[str, Any]) -> str:
    return f"{row['event']} of step {row['step']}" if "step" in row else str(row["event"])
