"""What quantune's launcher and the workers that it started on this machine tell each other: files in a folder.

outcome.json   how the run ended for good, by the first worker that knew: it is not to be started again
launcher       its process id
process-N      the process id of local rank N and its attempt, for signals that the launcher passes on
hung-ID        a worker was ended because it hung
stop           the launcher was asked to stop, perhaps before a worker could be told

Nothing here imports torch: a worker that is started again after the run has ended leaves at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from quantune.distributed.environment import attempt
from quantune.errors import EXIT_DIED

FOLDER = "QUANTUNE_LAUNCH"
"""Environment variable: the folder."""
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl."""


@attrs.frozen
class LaunchFolder:
    """The folder of one launch on one machine."""

    path: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> LaunchFolder | None:
        """The folder of the launcher that started this process; None where it was not quantune's."""
        return cls(Path(environment[FOLDER])) if FOLDER in environment else None

    def settle(self, exit_code: int) -> None:
        """Say how the run ended, if nobody has."""
        partial = self.path / f"outcome-{os.getpid()}"
        partial.write_text(json.dumps({"exit_code": exit_code}), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(partial, self.path / "outcome.json")  # whole, and only where there is none
        partial.unlink()

    def outcome(self) -> int | None:
        """The exit code that the run ended with; None while it has not."""
        try:
            return int(json.loads((self.path / "outcome.json").read_text(encoding="utf-8"))["exit_code"])
        except FileNotFoundError:
            return None

    def enter(self, local_rank: int) -> None:
        """Register this process as a worker that ends with its launcher."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.launcher():  # it died before it could be waited for
                os._exit(EXIT_DIED)
        partial = self.path / f"process-{local_rank}.new"
        partial.write_text(f"{os.getpid()} {attempt()}", encoding="utf-8")
        partial.replace(self.path / f"process-{local_rank}")

    def launch(self) -> None:
        """Register this process as the launcher."""
        (self.path / "launcher").write_text(str(os.getpid()), encoding="utf-8")

    def launcher(self) -> int:
        """The process id of the launcher."""
        return int((self.path / "launcher").read_text(encoding="utf-8"))

    def processes(self) -> Iterator[int]:
        """Process ids of the workers, as far as they have begun."""
        return (process for process, _ in self._workers())

    def lost_one(self) -> bool:
        """Whether a worker of this attempt has begun and is gone."""
        return any(begun == attempt() and not _runs(process) for process, begun in self._workers())

    def _workers(self) -> Iterator[tuple[int, int]]:
        for path in self.path.glob("process-[0-9]*"):
            if path.suffix != ".new":
                process, begun = path.read_text(encoding="utf-8").split()
                yield int(process), int(begun)

    def end_hung(self, process: int) -> None:
        """End a worker that hangs, if the launcher of this folder started it."""
        if process in self.processes():
            (self.path / f"hung-{process}").touch()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def hung(self, process: int) -> bool:
        """Whether a worker was ended because it hung."""
        return (self.path / f"hung-{process}").exists()

    def ask_to_stop(self, number: int) -> None:
        """Pass a signal on to all workers, and leave word for those that have not started."""
        (self.path / "stop").touch()
        self.signal(number)

    def asked_to_stop(self) -> bool:
        """Whether the launcher was asked to stop."""
        return (self.path / "stop").exists()

    def signal(self, number: int) -> None:
        """Send a signal to all workers."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
