"""The checkpoints of one run, by step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import attrs

from quantune.checkpoint.commit import REPLACED, TEMPORARY, manifest_files, remove, verify, write_committed
from quantune.errors import CheckpointError

WRITER = "checkpoint"
"""The name of the thread that writes one."""
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
        pattern = re.compile(rf"step-(\d{{8,}})({re.escape(REPLACED)})?")
        names = (pattern.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted({int(name[1]) for name in names if name})

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Commit the checkpoint of `step`, in the place of an earlier one of the same step.

        Raises:
            CheckpointError: the disk is full, or less is free than the latest checkpoint takes.
        """
        self._sweep()  # before the free space is looked at: a dead save may be what fills the disk
        return write_committed(
            self.folder, self.path(step).name, write, replace=True, expected_bytes=self._size_of_latest()
        )

    def latest_verified(self, report: Callable[[str], None]) -> Path | None:
        """The latest checkpoint that is whole; `report` hears of every damaged one passed over, and why."""
        folders = [path for step in reversed(self.steps()) for path in self._folders(step)]
        for path, before in zip_longest(folders, folders[1:]):
            try:
                verify(path)
            except CheckpointError as error:
                if before is None:
                    report(f"{error}; there is no checkpoint before it")
                else:
                    report(f"{error}; falling back to {before.name}, what was done after it is done again")
            else:
                return path
        return None

    def prune(self, keep: int) -> None:
        """Remove what dead saves left, and all but the last `keep` checkpoints; at least two whole ones stay."""
        self._sweep()
        kept = 0
        for step in reversed(self.steps()):
            needless = self._folders(step)
            if kept < max(keep, FEWEST):
                whole = next((path for path in needless if _is_whole(path)), None)
                # of a whole one, what it replaced and was killed before removing; damaged ones stay to be looked at
                needless = [] if whole is None else needless[needless.index(whole) + 1 :]
                kept += whole is not None
            for path in needless:
                remove(path)

    def _sweep(self) -> None:
        """Remove what dead saves left; the run folder is locked, so no save is alive."""
        for leftover in self.folder.glob(f"step-*{TEMPORARY}*"):
            shutil.rmtree(leftover)

    def _folders(self, step: int) -> list[Path]:
        """The checkpoint of a step, and the one it was about to replace when the process died, if one did."""
        path = self.path(step)
        return [folder for folder in (path, path.with_name(path.name + REPLACED)) if folder.is_dir()]

    def _size_of_latest(self) -> int:
        """Bytes of the latest checkpoint, which the next one will be as large as; 0 when there is none to go by."""
        for step in reversed(self.steps()):
            try:
                return sum(entry["size"] for entry in manifest_files(self.path(step)).values())
            except CheckpointError:  # damaged: whoever resumes hears of it, for an estimate the one before will do
                continue
        return 0


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True
