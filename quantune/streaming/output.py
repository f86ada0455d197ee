"""The folder that a checkpoint is written into: whole under its name, or not there.

model.partial/          what is written; `model/` is the folder that was asked for
  .lock                 which process writes it
  progress.json         what is written, from what, and which files are complete
  model-00001-of-...    complete once progress.json says so

A process that dies leaves `model.partial/`, which has no `config.json` until everything else is there; the same command
goes on after the last complete file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from quantune.checkpoint.commit import (
    DISK_ERRORS,
    REPLACED,
    make_folder,
    remove,
    sync,
    write_file_atomically,
)
from quantune.errors import CheckpointError, FolderInUseError, InputError

PARTIAL = ".partial"
PROGRESS = "progress.json"
LOCK = ".lock"


@attrs.define(eq=False)
class Output:
    """A folder that is being written, held by this process."""

    target: Path
    partial: Path
    report: str
    """Name of the file that says how the folder was made, and by which quantune knows its own."""
    identity: dict[str, Any]
    """What is written, from what; another process goes on with the same only. JSON values."""
    complete: dict[str, int] = attrs.field(factory=dict)
    """Size of every file that is complete."""
    notes: dict[str, str] = attrs.field(factory=dict)
    """What was found out while they were written."""

    discarded: bool = False
    """Whether an earlier process left complete files of something else, which are removed."""

    @property
    def resumed(self) -> bool:
        """Whether an earlier process left complete files."""
        return bool(self.complete)

    def finish_file(self, name: str, notes: Mapping[str, str]) -> None:
        """Note that a file is complete; it is flushed already."""
        self.complete[name] = (self.partial / name).stat().st_size
        self.notes.update(notes)
        self._save()

    def publish(self) -> None:
        """Give the folder its name."""
        for path in (*self.partial.iterdir(), self.partial):
            sync(path)
        aside = self.target.with_name(self.target.name + REPLACED)
        if self.target.is_dir():
            remove(aside)
            os.rename(self.target, aside)
        os.rename(self.partial, self.target)
        # not before: a process that dies between the two renames leaves a folder to go on with, and the old one aside
        for name in (PROGRESS, LOCK):
            (self.target / name).unlink(missing_ok=True)
        remove(aside)
        sync(self.target.parent)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _save(self) -> None:
        document = {"identity": self.identity, "complete": self.complete, "notes": self.notes}
        write_file_atomically(self.partial / PROGRESS, json.dumps(document))

    def _begin(self) -> None:
        """Go on with what an earlier process left, or begin anew."""
        try:
            document = json.loads((self.partial / PROGRESS).read_text(encoding="utf-8"))
            same = document["identity"] == json.loads(json.dumps(self.identity))
            self.discarded = not same and bool(document["complete"])
            complete = {str(name): int(size) for name, size in document["complete"].items()} if same else {}
            notes = dict(document["notes"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            complete, notes = {}, {}
        there = {name: (self.partial / name) for name in complete}
        if any(not path.is_file() or path.stat().st_size != complete[name] for name, path in there.items()):
            complete, notes = {}, {}
        for path in self.partial.iterdir():
            if path.name not in complete and path.name not in (LOCK, PROGRESS):
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
        self.complete, self.notes = complete, notes
        self._save()


@contextlib.contextmanager
def open_output(target: Path, *, report: str, identity: Mapping[str, Any], overwrite: bool = False) -> Iterator[Output]:
    """Hold `target`'s partial folder for the length of the context.

    Args:
        report: name of the file that says how the folder was made.
        identity: what is written, from what.
        overwrite: take the place of a folder that has `report` in it.

    Raises:
        InputError: the folder exists, or can't be written.
        FolderInUseError: another process writes it.
    """
    target = Path(os.path.abspath(target))
    require_free(target, report, overwrite=overwrite)
    partial = target.with_name(target.name + PARTIAL)
    try:
        make_folder(partial)
        lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{partial} can't be written: {error.strerror}; choose another --out") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode("utf-8", errors="replace").strip() or "another process"
            raise FolderInUseError(
                f"{target} is being written by {holder}; wait for it, or choose another --out"
            ) from None
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        output = Output(target=target, partial=partial, report=report, identity=dict(identity))
        try:
            with disk_errors(target):
                output._begin()
            yield output
        except Exception:
            if not output.complete:
                output.discard()
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a disk that is full or fails into a sentence.

    Raises:
        CheckpointError: with what is left of it.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(_existing(target)).free
        what = "the disk is full" if error.errno in DISK_ERRORS else error.strerror or str(error)
        raise CheckpointError(
            f"{target} can't be written: {what} ({size(free)} are free). Nothing is under that name yet; what is "
            f"complete waits in {target.name}{PARTIAL}, and the same command goes on with it"
        ) from error


def require_space(target: Path, nbytes: int) -> None:
    """Require that the disk holds `nbytes` in all, of which some may be written already.

    Raises:
        InputError: it does not; says how much is needed and how much there is.
    """
    partial = target.with_name(target.name + PARTIAL)
    written = sum(path.stat().st_size for path in partial.glob("*") if path.is_file())
    free = shutil.disk_usage(_existing(target)).free
    needed = nbytes - written
    if free < needed:
        raise InputError(
            f"{target} needs {size(needed)}, and the disk has {size(free)} free; make room, or choose another --out"
        )


def require_shard_size(text: str | None) -> None:
    """Require that the largest size of a file is one, e.g. `5GB`.

    Raises:
        InputError: it is not.
    """
    if text is not None and not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", text.upper()):
        raise InputError(f'--max-shard-size: expected a size in KB, MB, GB or TB, such as "5GB", found "{text}"')


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1024.

    >>> size(1536)
    '1.5 KiB'
    """
    amount, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def require_free(target: Path, report: str, *, overwrite: bool) -> None:
    """Require that a folder may be written, before much is done for it.

    Raises:
        InputError: it exists, and is not to be replaced, or is not one that has `report` in it.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"expected a new folder for --out, found the file {target}")
    if not overwrite:
        raise InputError(f"{target} exists already; --overwrite replaces it, --out DIR writes elsewhere")
    if not (target / report).is_file():
        raise InputError(f"{target} is not a folder that this command wrote (it has no {report}), and is not replaced")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
