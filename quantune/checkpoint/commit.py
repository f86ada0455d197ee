"""Writing a folder so that it is whole or absent, whenever the process or the machine dies.

    step-00000010.tmp-<uuid>/   every file is written here and flushed to the disk
    manifest.json               sizes and sha256 of all of them, written last, flushed
    step-00000010/              one rename publishes the folder; the parent is flushed

A folder that takes the place of another of its name moves that one to `step-00000010.replaced/` for the length of one
rename; a process that dies in between leaves it there, whole.

Nothing else detects a flipped byte: neither safetensors nor torch checks what it loads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from quantune.errors import CheckpointError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
REPLACED = ".replaced"
CHUNK = 1024 * 1024
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_MESSAGES = (
    *(f"(os error {number})" for number in DISK_ERRORS),  # safetensors, which is written in Rust
    "PytorchStreamWriter failed writing",  # torch.save
    "inline_container.cc",  # torch.save, closing the archive that it could not write
)


def write_committed(
    parent: Path, name: str, write: Callable[[Path], None], *, replace: bool = False, expected_bytes: int = 0
) -> Path:
    """Let `write` fill a new folder, and publish it as `parent / name`.

    Args:
        replace: take the place of a folder of that name; at every instant the old or the new one is whole, the old one
            perhaps under `name.replaced`.
        expected_bytes: about how much will be written; with less than that free, nothing is begun.

    Raises:
        CheckpointError: the folder exists and is not to be replaced, the disk is full, or `write` wrote a
            `manifest.json` of its own. Whatever `write` raises otherwise passes through. In every case the temporary
            folder is gone and what was saved before is untouched.
    """
    target = parent / name
    if not replace and os.path.lexists(target):
        raise CheckpointError(f"{target} exists already, and a committed folder is never written into")
    make_folder(parent)
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise CheckpointError(_full_disk(target, f"about {_size(expected_bytes)}", free))
    temporary = parent / f"{name}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        write(temporary)
        _seal(temporary)
        _publish(temporary, target)
    except BaseException as error:
        # before anything is raised or looked at: the space that the half-written folder takes is what others lack
        written = sum(path.stat().st_size for path in _files(temporary))
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_is_full(error):
            needed = f"about {_size(expected_bytes)}" if expected_bytes > written else f"more than {_size(written)}"
            raise CheckpointError(_full_disk(target, needed, shutil.disk_usage(parent).free)) from error
        raise
    sync(parent)
    remove(target.with_name(name + REPLACED))
    return target


def verify(folder: Path, names: Collection[str] | None = None) -> None:
    """Check that every file of a committed folder, or those of `names`, is as it was written. Files that it does not
    list are let be.

    Raises:
        CheckpointError: naming the file that is missing or damaged, or that lies outside the folder.
    """
    for name, entry in manifest_files(folder).items():
        if names is not None and name not in names:
            continue
        try:
            _verify_file(folder, name, entry["size"], entry["sha256"])
        except (OSError, ValueError) as error:  # a disk that fails; a name that can't be one
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{folder.name}/{name} can't be read: {reason}") from error


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file of a committed folder, by its relative path, as its manifest has them.

    Raises:
        CheckpointError: there is no manifest, or it is not what `write_committed` writes.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        whole = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in files.values())
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name} has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{folder.name}/{MANIFEST} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{folder.name}/{MANIFEST} is damaged")
    return files


def write_file_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole or not at all.

    Raises:
        OSError: the file can't be written; it is as it was before.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def file_hash(path: Path) -> str:
    """sha256 of a file, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file, and that it is there, to the disk."""
    sync(path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there yet; a power loss does not take them back.

    Raises:
        OSError: it can't be made, or is a file.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there, so that a process that dies meanwhile leaves nothing that looks like it."""
    if folder.is_dir():
        doomed = folder.with_name(f"{folder.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _verify_file(folder: Path, name: str, size: int, sha256: str) -> None:
    """Check one file that the manifest names."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder.name}/{MANIFEST} names a file outside the folder: {name}")
    if not path.is_file():
        raise CheckpointError(f"{folder.name}/{name} is missing")
    if path.stat().st_size != size:
        raise CheckpointError(f"{folder.name}/{name} has {path.stat().st_size} bytes, expected {size}")
    if file_hash(path) != sha256:
        raise CheckpointError(f"{folder.name}/{name} is damaged: its sha256 is not the one it was written with")


def _seal(folder: Path) -> None:
    """Flush all that is in a folder, with a manifest of it."""
    if (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{MANIFEST} is the commit's own file, and was written to {folder.name} by what it commits"
        )
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def _publish(temporary: Path, target: Path) -> None:
    """Give the new folder its name; a folder that has it keeps its content under another name until then."""
    if not target.is_dir():
        os.rename(temporary, target)
        return
    aside = target.with_name(target.name + REPLACED)
    remove(aside)  # of a save that died after its own rename: `target` is whole
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _disk_is_full(error: BaseException) -> bool:
    """safetensors and torch report a full disk as errors of their own, with the system's error somewhere in them."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in DISK_ERRORS or any(words in str(cause) for words in DISK_MESSAGES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _full_disk(target: Path, needed: str, free: int) -> str:
    return (
        f"{target} could not be written, the disk is full: it takes {needed}, {_size(free)} are free (or a quota or "
        "limit on file sizes is reached). What was saved before is untouched; free some space and resume"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
