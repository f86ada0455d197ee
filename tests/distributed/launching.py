"""Launching a toy run from a process forked from this one, which has imported torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from quantune.cli.console import fail_with, meaning
from quantune.distributed import worker
from quantune.distributed.launch import Nodes, launch
from quantune.recipe.schema import DistributedConfig

TOY = Path(__file__).with_name("toy.py")
PATIENCE = 60
"""Seconds until what is waited for counts as failed."""


@attrs.frozen
class Launched:
    """A launcher that runs in a folder, beside the test."""

    process: int
    folder: Path
    output: Path

    def said(self) -> str:
        """What it and its workers have written so far."""
        return self.output.read_text()

    def errors(self) -> list[str]:
        """The lines that tell the person of a failure."""
        return [line for line in self.said().splitlines() if line.startswith(("error:", "bug:", "interrupted"))]

    def wait_for(self, text: str) -> None:
        """Wait until it has said something."""
        wait_until(lambda: text in self.said(), f"never said {text!r}, but: {self.said()}")

    def send(self, number: int) -> None:
        """Send the launcher alone a signal, as a scheduler does; a terminal's Ctrl-C reaches only it as well."""
        os.kill(self.process, number)

    def ended(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        raise AssertionError(f"still running after {PATIENCE} seconds: {self.said()}")

    def workers(self) -> list[int]:
        """Process ids of workers, whichever launcher or attempt they are of, that run in the folder."""
        return [process for process in processes() if _runs_in(process, self.folder) and process != self.process]

    def log(self, rank: int) -> str:
        """What a rank wrote to its log."""
        return (self.folder / "run" / "logs" / f"rank-{rank}.log").read_text()

    def fired(self) -> list[str]:
        """Which faults have fired: `rank-attempt` each."""
        return sorted(path.name.removeprefix("fired-") for path in self.folder.glob("fired-*"))


def launched(
    folder: Path,
    *,
    processes: int = 2,
    nodes: Nodes | None = None,
    restarts: int = 0,
    timeout: float = 60,
    output: str = "output",
    begin: Callable[[], None] = lambda: None,
    **toy: object,
) -> Launched:
    """Launch a toy run in `folder`; see `toy.py` for what it is told. `begin` is called by the launcher first."""
    written_to = folder / output
    process = os.fork()
    if process == 0:
        code = 99
        try:
            os.chdir(folder)
            written = os.open(written_to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(written, stream)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            (folder / "temporary").mkdir(exist_ok=True)
            tempfile.tempdir = str(folder / "temporary")  # a launcher that is killed leaves something there
            begin()
            config = DistributedConfig(max_restarts=restarts, timeout=timeout)
            given = json.dumps({"timeout": timeout, **toy})
            try:
                code = launch((str(TOY), given), processes, nodes or Nodes(), config, fail_with)
            except BaseException as error:
                code = worker.end(error, lambda error: meaning(False, error))
        finally:
            os._exit(code)
    wait_until(written_to.exists, "the launcher did not begin")
    return Launched(process, folder, written_to)


def wait_until(holds: Callable[[], bool], otherwise: str, patience: float = PATIENCE) -> None:
    """Wait for something to hold."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _runs_in(process: int, folder: Path) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and Path(f"/proc/{process}/cwd").resolve() == folder.resolve()
    except OSError:
        return False
