"""What a run did, attempt after attempt: `history.jsonl`, which is only ever added to.

One JSON object a line, each with an `event`:

attempt      number, process, host, processes; resumed, the step it goes on from (null: it begins); versions; steps, how
             many there will be; and what the order of its samples is a function of: batch_size, samples, seed, shuffle
fallback     a later checkpoint is damaged, which and how
step         the step, counted from 1, the indices of its samples, a digest of their tokens
evaluation   after a step
saving       the state after a step was captured and is being written
checkpoint   the checkpoint of a step is committed
interrupted  asked to stop after a step
finished     the last step is done, the adapter published

`metrics.jsonl` tells the story of the run as if nothing had happened to it, this one of what did.
`quantune.checkpoint.audit` checks it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from quantune.checkpoint.commit import sync_file
from quantune.errors import QuantuneError, RunFolderError

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen
class History:
    """The history of a run, written by one process at a time."""

    path: Path

    def append(self, event: str, **values: Any) -> None:
        """Add an event; it is with the system, if not on the disk, when this returns. An attempt begins a line of its
        own, whatever the one before it left.

        Raises:
            QuantuneError: the file can't be written.
        """
        row = json.dumps({"event": event, **values})
        try:
            torn = event == "attempt" and self._is_torn()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{row}\n" if torn else f"{row}\n")
        except OSError as error:
            raise QuantuneError(
                f"{self.path} can't be written: {error.strerror}. What is saved is untouched; put that right and resume"
            ) from error

    def _is_torn(self) -> bool:
        """Whether a dying process left the last line half-written."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def flush(self) -> None:
        """Put what was added on the disk: a checkpoint must not outlive the steps that led to it."""
        if self.path.exists():
            sync_file(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """All events. A line that a dying process left half-written is none.

        Raises:
            RunFolderError: the file can't be read, or a line that is followed by more of the same attempt is no event.
        """
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunFolderError(f"{self.path} can't be read: {error.strerror}") from error
        rows = [_parsed(line) for line in lines]
        kept = []
        for number, (row, following) in enumerate(zip_longest(rows, rows[1:]), start=1):
            if row is not None:
                kept.append(row)
            elif number < len(rows) and (following is None or following["event"] != "attempt"):
                raise RunFolderError(
                    f"{self.path}:{number}: expected a JSON object with an event, found {lines[number - 1][:60]!r}"
                )
        return kept


def digest(samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """A digest of samples, each as its tokens and which of them are targets, in their order."""
    made = hashlib.sha256()
    for tokens, targets in samples:
        made.update(len(tokens).to_bytes(8, "little"))
        made.update(tokens.tobytes())
        made.update(targets.tobytes())
    return made.hexdigest()[:16]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None
