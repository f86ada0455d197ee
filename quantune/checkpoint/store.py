"""The checkpoints of one run, by step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs

from quantune.checkpoint.commit import TEMPORARY, verify, write_committed
from quantune.errors import CheckpointError

FEWEST = 2
"""Verified checkpoints that pruning always leaves, so that a damaged one has a predecessor."""


@attrs.frozen
class CheckpointStore:
    """A folder of `step-00000010` folders."""

    folder: Path

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, rising. The highest step is the latest, whatever the clock says."""
        names = (re.fullmatch(r"step-(\d{8})", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Commit the checkpoint of `step`, in the place of an earlier one of the same step."""
        path = self.path(step)
        if path.exists():  # of a run that went on from before it, or a damaged one
            shutil.rmtree(path)
        return write_committed(self.folder, path.name, write)

    def latest_verified(self, report: Callable[[str], None]) -> Path | None:
        """The latest checkpoint that is whole; `report` hears of every damaged one passed over."""
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                report(f"{error}; falling back to the checkpoint before it")
            else:
                return self.path(step)
        return None

    def prune(self, keep: int) -> None:
        """Remove what dead saves left, and all but the last `keep` checkpoints; at least two whole ones stay."""
        for leftover in self.folder.glob(f"step-*{TEMPORARY}*"):
            shutil.rmtree(leftover)
        kept = 0
        for step in reversed(self.steps()):
            if kept >= max(keep, FEWEST):
                shutil.rmtree(self.path(step))
            elif self._is_whole(step):
                kept += 1

    def _is_whole(self, step: int) -> bool:
        try:
            verify(self.path(step))
        except CheckpointError:
            return False
        return True
