"""The folder of a run: who may use it, and what is in it.

recipe.toml     the recipe as it was resolved
manifest.json   versions, hardware, hashes of base and data
metrics.jsonl   one row a step and an evaluation
history.jsonl   what every attempt did, see `quantune.checkpoint.history`
checkpoints/    what the run resumes from
adapter/        the result
merged/         the result in its base, where `quantune merge` wrote it
logs/           what ranks other than 0 said, a file each
status.json     running, interrupted or finished, and at which step
.overwriting    what is here is an older run's, and is removed once the one that overwrites it has loaded
.lock           which process uses the folder; its text also says that the folder is a run's
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs

from quantune.checkpoint.commit import TEMPORARY, make_folder, write_file_atomically
from quantune.checkpoint.history import History
from quantune.checkpoint.metrics_log import MetricsLog
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import FolderInUseError, QuantuneError, RunFolderError

__all__ = ["MetricsLog", "Mode", "RunFolder", "State"]

Mode = Literal["new", "resume", "overwrite"]
State = Literal["running", "interrupted", "finished"]
STATES = ("running", "interrupted", "finished")
STATUS = "status.json"
HISTORY = "history.jsonl"
FILES = ("recipe.toml", "manifest.json", "metrics.jsonl", HISTORY, STATUS)
PACKED = "the packed weights"
"""What the manifest's fingerprints call that of the quantized base."""
FOLDERS = ("checkpoints", "adapter", "adapter.replaced", "merged", "merged.partial", "merged.replaced")
LOGS = "logs"
LOCK = ".lock"
OVERWRITING = ".overwriting"
HOLDER = re.compile(r"process \d+ on \S+")
"""What a lock file says. Other programs have a `.lock` too, and a `manifest.json`, and even an `adapter/`."""


@attrs.frozen
class RunFolder:
    """A run's folder, held by this process."""

    path: Path

    @property
    def checkpoints(self) -> CheckpointStore:
        """What the run resumes from."""
        return CheckpointStore(self.path / "checkpoints")

    @property
    def adapter(self) -> Path:
        """Where the result goes."""
        return self.path / "adapter"

    def log(self, rank: int) -> Path:
        """Where a rank other than 0 says what it has to say."""
        return self.path / LOGS / f"rank-{rank}.log"

    @property
    def metrics(self) -> MetricsLog:
        """One row a step and an evaluation."""
        return MetricsLog(self.path / "metrics.jsonl")

    @property
    def history(self) -> History:
        """What every attempt did."""
        return History(self.path / HISTORY)

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe."""
        _write(self.path / "recipe.toml", text)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write what the run was made of."""
        _write(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def fingerprints(self) -> dict[str, Any]:
        """What the manifest says the run was made of, empty where it says nothing."""
        try:
            return dict(json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))["fingerprints"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write_status(self, state: State, step: int) -> None:
        """Write where the run stands."""
        _write(self.path / STATUS, json.dumps({"state": state, "step": step}) + "\n")

    def state(self) -> State | None:
        """Where the run stands; None for a folder that no run has got far enough in to say.

        Raises:
            RunFolderError: the status is there and can't be read.
        """
        try:
            state = json.loads((self.path / STATUS).read_text(encoding="utf-8"))["state"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise RunFolderError(f"{self.path / STATUS} can't be read: {error.strerror}") from error
        return state if state in STATES else None

    def unfinished(self) -> bool:
        """Whether a run was begun here and is not finished; it may have saved nothing yet."""
        state = self.state()
        return state in ("running", "interrupted") or (state is None and bool(self.checkpoints.steps()))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, mode: Mode) -> Iterator[RunFolder]:
        """Hold the folder for the length of the context; nothing is loaded before this is settled.

        Args:
            mode: `new` starts a run where none is, `resume` goes on with an unfinished one, `overwrite` lets a run
                start again where one is, see `clear`.

        Raises:
            RunFolderError: another process holds it, it can't be written to, it is not a run's folder, or `mode` does
                not fit what is in it.
        """
        try:
            _refuse_foreign(path)
            if mode == "resume" and not _is_run_folder(path):
                what = "is empty" if path.exists() else "does not exist"
                raise RunFolderError(f"there is nothing to resume: {path} {what}. Leave out --resume to start")
            make_folder(path)
            _probe(path)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"the run folder {path} can't be written to: {error.strerror}. Choose another output.dir"
            ) from error
        try:
            _acquire(lock, path)
            folder = cls(path)
            folder._prepare(mode)
            yield folder
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a forked worker still has it open
            os.close(lock)

    def going_on(self, mode: Mode) -> Mode | None:
        """How a run that was begun with `mode` goes on where it died, whatever it left; None if it had finished."""
        if mode == "overwrite" and (self.path / OVERWRITING).exists():
            return mode
        if self.state() == "finished":
            return None
        return "resume" if self.unfinished() else "overwrite"

    def _prepare(self, mode: Mode) -> None:
        state = self.state()
        if mode == "overwrite":
            (self.path / OVERWRITING).touch()
            return
        if mode == "resume":
            if state == "finished":
                raise RunFolderError(
                    f"the run in {self.path} is finished, and a finished run can't be made longer: train on from its "
                    f"adapter with [adapter] start_from in another output.dir, or start it again with --overwrite"
                )
            _remove(self.path / OVERWRITING)
            self._sweep()  # one that stopped before its first checkpoint begins again
        elif state == "finished":
            raise RunFolderError(
                f"{self.path} holds a finished run; --overwrite starts it again, "
                "--set output.dir=... keeps it and goes elsewhere"
            )
        elif self.checkpoints.steps():
            raise RunFolderError(
                f"{self.path} holds an unfinished run; --resume goes on with it, --overwrite starts it again"
            )

    def clear(self) -> None:
        """Remove quantune's own files, for a run that starts from its first step.

        The run calls it once it knows that it can start: a typo must not cost the run that is to be overwritten. The
        status goes last: until then the folder still says what it was.
        """
        for name in FOLDERS:
            _remove(self.path / name)
        for name in (*FILES, OVERWRITING):
            _remove(self.path / name)
        self._sweep()

    def _sweep(self) -> None:
        """Remove the temporary files of a process that died while it wrote one of ours."""
        for name in (*FILES, *FOLDERS):
            for leftover in self.path.glob(f"{name}{TEMPORARY}*"):
                _remove(leftover)


def _write(path: Path, text: str) -> None:
    """Replace a file of the folder.

    Raises:
        QuantuneError: it can't be written; it is as it was before.
    """
    try:
        write_file_atomically(path, text)
    except OSError as error:
        raise QuantuneError(
            f"{path} can't be written: {error.strerror}. What is saved is untouched; put that right and resume"
        ) from error


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"expected a folder for the run, found a file: {path}")
    if path.is_dir() and not _is_run_folder(path):
        entries = sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK, LOGS))
        if entries:
            raise RunFolderError(
                f"{path} is not a run folder, and not empty ({', '.join(entries[:3])}); choose another output.dir"
            )


def _is_run_folder(path: Path) -> bool:
    """Whether quantune has been here: its lock or its status says so, names alone do not."""
    try:
        holder = (path / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # none, or not for us to read: then the status has to say it
        holder = ""
    return HOLDER.fullmatch(holder) is not None or RunFolder(path).state() is not None


def _probe(path: Path) -> None:
    """Write a file and remove it, as the run will; permission bits say little, to root nothing."""
    probe = path / f"{STATUS}{TEMPORARY}{os.getpid()}"
    try:
        probe.write_text("x", encoding="utf-8")
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file or folder of ours, but nothing that a link leads to."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # left behind, a checkpoint of the old run would pass for one of the new
        raise RunFolderError(f"{path} can't be removed: {error.strerror or error}") from error


def _acquire(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 1024).decode("utf-8", errors="replace").strip() or "another process"
        raise FolderInUseError(f"{path} is in use by {holder}; wait for it, or choose another output.dir") from None
    except OSError as error:
        raise RunFolderError(
            f"{path} can't be locked: {error.strerror}. Choose an output.dir on a file system that has locks"
        ) from error
    text = f"process {os.getpid()} on {socket.gethostname()}".encode()
    os.pwrite(lock, text, 0)
    os.ftruncate(lock, len(text))
