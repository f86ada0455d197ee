"""Commands of quantune in processes forked from this one, which has imported everything: seconds less than a start."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs
import torchao  # noqa: F401  what publishing an adapter imports

import quantune.cli
import quantune.training.answer  # noqa: F401  what generating imports
import quantune.training.run  # noqa: F401  what a run imports
from quantune.cli import console

TIMEOUT = 180
"""Seconds after which a command counts as hung."""


@attrs.frozen(kw_only=True)
class Done:
    """A command that ended."""

    code: int
    """Its exit code, negative for a signal."""
    said: str
    """What it wrote to standard output, and to standard error where that is the same file."""


@attrs.define(kw_only=True)
class Command:
    """A command that was started."""

    process: int
    output: Path
    code: int | None = None
    """Its exit code, negative for a signal; None while it has not ended."""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process, number)

    def wait(self, seconds: float = TIMEOUT) -> int | None:
        """Its exit code; None if it has not ended by then."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        if self.code is None:
            self.send(signal.SIGKILL)
            self.wait()

    def end(self) -> Done:
        """Wait for its end.

        Raises:
            AssertionError: it did not come; the process is gone now.
        """
        code = self.wait()
        self.kill()
        assert code is not None, f"did not end within {TIMEOUT} seconds; it wrote:\n{self.said()}"
        return Done(code=code, said=self.said())

    def said(self) -> str:
        """What it wrote so far."""
        return self.output.read_text(errors="replace")


def start(
    *arguments: str | Path,
    output: Path,
    errors: Path | None = None,
    cwd: Path | None = None,
    before: Callable[[], object] = lambda: None,
    **variables: str,
) -> Command:
    """Start `quantune` with `arguments`; `before` is called in the new process.

    It writes to the file `output`, and what it writes to standard error to `errors` or there as well. The folders of
    a PYTHONPATH among its `variables` are on its path, as they are on that of a new Python.
    """
    child = os.fork()
    if child:
        return Command(process=child, output=output)
    code = 1
    try:
        os.environ.update({"COLUMNS": "300", "NO_COLOR": "1", **variables})
        if cwd is not None:
            os.chdir(cwd)
        code = _main([str(argument) for argument in arguments], output, errors or output, before)
    finally:
        os._exit(code)


def _main(arguments: list[str], output: Path, errors: Path, before: Callable[[], object]) -> int:
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), encoding="utf-8", write_through=True)
    logging.getLogger().handlers.clear()  # pytest's, which would keep a library's words from the screen
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    importlib.invalidate_caches()
    sys.argv = ["quantune", *arguments]
    console.given_arguments()[:] = arguments  # kept when the module was imported, as the width may have been
    console.out.width = console.err.width = int(os.environ["COLUMNS"])
    try:
        before()
        quantune.cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
