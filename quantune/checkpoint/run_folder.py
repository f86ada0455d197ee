"""The folder of a run: who may use it, and what is in it.

recipe.toml     the recipe as it was resolved
manifest.json   versions, hardware, hashes of base and data
metrics.jsonl   one row a step and an evaluation
checkpoints/    what the run resumes from
adapter/        the result
status.json     running, interrupted or finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs

from quantune.checkpoint.commit import write_file
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import RunFolderError

Mode = Literal["new", "resume", "overwrite"]
FILES = ("recipe.toml", "manifest.json", "metrics.jsonl", "status.json")
FOLDERS = ("checkpoints", "adapter")
LOCK = ".lock"


@attrs.frozen
class RunFolder:
    """A run's folder, held by this process."""

    path: Path

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints")

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.path / "metrics.jsonl")

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe."""
        write_file(self.path / "recipe.toml", text)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write what the run was made of."""
        write_file(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def write_status(self, state: Literal["running", "interrupted", "finished"], step: int) -> None:
        """Write where the run stands."""
        write_file(self.path / "status.json", json.dumps({"state": state, "step": step}) + "\n")

    def state(self) -> str | None:
        """`running`, `interrupted` or `finished`; None for a folder that no run has written to."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))["state"]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, mode: Mode) -> Iterator[RunFolder]:
        """Hold the folder for the length of the context.

        Raises:
            RunFolderError: another process holds it, it can't be written to, or `mode` does not fit what is in it.
        """
        _refuse_foreign(path)
        if mode == "resume" and not path.exists():
            raise RunFolderError(f"there is nothing to resume: {path} does not exist. Leave out --resume to start")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"the run folder {path} can't be written to: {error.strerror}") from error
        with lock:
            _acquire(lock, path)
            folder = cls(path)
            folder._prepare(mode)
            yield folder

    def _prepare(self, mode: Mode) -> None:
        state = self.state()
        if mode == "overwrite":
            self._clear()
        elif mode == "resume":
            if state == "finished":
                raise RunFolderError(f"the run in {self.path} is finished; --overwrite starts it again")
            if not self.checkpoints.steps():
                raise RunFolderError(
                    f"there is nothing to resume: {self.path} holds no checkpoint. Leave out --resume to start"
                )
        elif state == "finished":
            raise RunFolderError(
                f"{self.path} holds a finished run; --overwrite starts it again, "
                "--set output.dir=... keeps it and goes elsewhere"
            )
        elif self.checkpoints.steps():
            raise RunFolderError(
                f"{self.path} holds an unfinished run; --resume goes on with it, --overwrite starts it again"
            )
        else:
            self._clear()  # a run that died before its first checkpoint

    def _clear(self) -> None:
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)


@attrs.frozen
class MetricsLog:
    """One JSON object a line; each has a `step`."""

    path: Path

    def append(self, row: dict[str, Any]) -> None:
        """Add a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line that a dying process left half-written is no row."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps: the resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"expected a folder for the run, found a file: {path}")
    if path.is_dir() and not any((path / name).exists() for name in (*FILES, LOCK)):
        entries = sorted(entry.name for entry in path.iterdir())
        if entries:
            raise RunFolderError(
                f"{path} is not a run folder, and not empty ({', '.join(entries[:3])}); choose another output.dir"
            )


def _acquire(lock: Any, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RunFolderError(f"{path} is in use by {holder}; wait for it, or choose another output.dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
