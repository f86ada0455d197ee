"""Disks that are full or can't be written, for a test alone: in a process with mounts of its own."""

from __future__ import annotations

import ctypes
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)
READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # of mount(2)
LIBC = ctypes.CDLL(None, use_errno=True)


def in_own_mounts(body: Callable[[], object]) -> None:
    """Do `body` in a forked process whose mounts nobody else sees.

    Raises:
        AssertionError: it failed, with its traceback.
        pytest.skip.Exception: the system allows no mounts.
    """
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            try:
                _unshare()
                body()
                os._exit(0)
            except PermissionError as error:
                answer.write(str(error))
                answer.flush()
                os._exit(2)
            except BaseException:
                answer.write(traceback.format_exc())
                answer.flush()
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer.seek(0)
        if code == 2:
            pytest.skip(f"this system allows a test no mounts: {answer.read()}")
        assert code == 0, answer.read()


def mount_small(folder: Path, size: str) -> None:
    """Put a disk of `size`, e.g. `64k`, at `folder`, or make the one that is there that large."""
    flags = REMOUNT if folder.is_mount() else 0
    folder.mkdir(exist_ok=True)
    _checked(LIBC.mount(b"none", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()))


def mount_read_only(folder: Path) -> None:
    """Let nothing be written into `folder`, not even by root."""
    name = os.fsencode(folder)
    _checked(LIBC.mount(name, name, None, BIND, None))
    _checked(LIBC.mount(None, name, None, BIND | REMOUNT | READ_ONLY, None))


def _unshare() -> None:
    user, group = os.getuid(), os.getgid()
    _checked(LIBC.unshare(NEW_USER | NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise PermissionError(number, os.strerror(number))
