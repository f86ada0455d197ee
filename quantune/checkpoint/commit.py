"""Writing a folder so that it is whole or absent, whenever the process or the machine dies.

    step-00000010.tmp-<uuid>/   every file is written here and flushed to the disk
    manifest.json               sizes and sha256 of all of them, written last, flushed
    step-00000010/              one rename publishes the folder; the parent is flushed

Nothing else detects a flipped byte: neither safetensors nor torch checks what it loads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from quantune.errors import CheckpointError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
CHUNK = 1024 * 1024
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_MESSAGES = ("No space left", "os error 28", "File too large", "os error 27", "Disk quota exceeded", "os error 122")


def write_committed(parent: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder, and publish it as `parent / name`, which must not exist.

    Raises:
        CheckpointError: the disk is full. Whatever `write` raises otherwise passes through. Either way nothing is left.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f"{name}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        manifest = {
            path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": file_hash(path)}
            for path in files
        }
        (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        os.rename(temporary, parent / name)
        sync(parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_is_full(error):
            free = shutil.disk_usage(parent).free
            raise CheckpointError(
                f"{parent / name} could not be written, the disk is full ({free / 2**20:.0f} MiB free); what was saved "
                "before is untouched. Free some space and resume"
            ) from error
        raise
    return parent / name


def verify(folder: Path) -> None:
    """Check that every file of a committed folder is as it was written.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name} has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder.name}/{MANIFEST} is damaged") from None
    for name, entry in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder.name}/{MANIFEST} names a file outside the folder: {name}")
        if not path.is_file():
            raise CheckpointError(f"{folder.name}/{name} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder.name}/{name} has {path.stat().st_size} bytes, expected {entry['size']}")
        if file_hash(path) != entry["sha256"]:
            raise CheckpointError(f"{folder.name}/{name} is damaged: its sha256 is not the one it was written with")


def write_file(path: Path, text: str) -> None:
    """Replace a file as a whole or not at all."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
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


def _disk_is_full(error: BaseException) -> bool:
    """safetensors and torch report a full disk as errors of their own, with the system's words in them."""
    return getattr(error, "errno", None) in DISK_ERRORS or any(words in str(error) for words in DISK_MESSAGES)
