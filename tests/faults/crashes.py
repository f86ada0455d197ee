"""Dying at every point of something that writes files.

A *point* is where the process is about to create, open for writing, rename or remove a file or folder, or is about to
flush one, or has just flushed it. Python reports no writes, and what Rust writes goes by no point at all: `torn` dies
in the middle of those.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def killed(number: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that SIGKILLs itself at its n-th point; False when it got through."""

    def die(point: int) -> None:
        if point == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return _ended(lambda: watched(action, die), signal.SIGKILL)


def torn(number: int, size: int, action: Callable[[], object]) -> bool:
    """As `killed`, but from its n-th point on it dies in the first write that makes a file larger than `size` bytes."""

    def limit(point: int) -> None:
        if point == number:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would raise an error instead

    return _ended(lambda: watched(action, limit), signal.SIGXFSZ)


def count_points(action: Callable[[], object]) -> int:
    """How many points `action` has, which a forked process does."""
    with tempfile.TemporaryFile() as answer:
        assert exit_code(lambda: watched(action, lambda point: os.ftruncate(answer.fileno(), point))) == 0
        return os.fstat(answer.fileno()).st_size


def watched(action: Callable[[], object], at: Callable[[int], None], flushed: Callable[[int], None] = os.fstat) -> None:
    """Do `action` in this process, which is not used for anything else afterwards.

    Args:
        at: called with the number of each point, from 1.
        flushed: called with a descriptor that was just flushed.
    """
    flush, number, watching = os.fsync, 0, True

    def point() -> None:
        nonlocal number, watching
        number += 1
        watching = False  # what `at` does is no point
        at(number)
        watching = True

    def fsync(descriptor: int) -> None:
        point()
        flush(descriptor)
        flushed(descriptor)
        point()

    def watch(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if watching and (event in CHANGES or opened):
            point()

    os.fsync = fsync
    sys.addaudithook(watch)
    try:
        action()
    finally:
        watching = False


def _ended(action: Callable[[], object], by: signal.Signals) -> bool:
    """Do `action` in a forked process; whether it ended by that signal and not by itself.

    Raises:
        AssertionError: it ended otherwise.
    """
    code = exit_code(action)
    assert code in (0, -by), f"expected the process to get through or die by {by.name}, it ended with {code}"
    return code != 0


def exit_code(action: Callable[[], object]) -> int:
    """The exit code of a forked process that does `action`: negative for a signal, 1 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
