"""The life of one process of a run with several: entering, watching the others, and ending with one voice.

The first process that fails speaks, with its rank; the others end with the same exit code and write to their logs. A
failure is final when it would come up again. Deaths and hangs are not: the launcher starts all processes again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from quantune.checkpoint.run_folder import Mode, RunFolder
from quantune.distributed.environment import adopt_slurm, attempt, launched
from quantune.distributed.outcome import LaunchFolder
from quantune.distributed.stopping import BEFORE_THE_FIRST_STEP
from quantune.errors import EXIT_FAILURE, DistributedError, InterruptedRun

if TYPE_CHECKING:
    from quantune.distributed.watch import Board, Failure

DEFERENCE = 2.0
"""Seconds that other ranks leave to rank 0 to report what all of them found."""
SECONDS_TO_HEAR = 5.0
"""How long a rank that lost another one waits to hear why."""

Speak = Callable[[str], object]
"""Tells the person, with something to put before it."""


@attrs.define
class Voice:
    """Where this process speaks: to the terminal, or to its log."""

    terminal: int | None = None
    """A copy of the terminal's file descriptor while this process writes to its log."""

    def to_log(self, path: Path) -> None:
        """Write everything, the libraries' output as well, to the end of a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.terminal = os.dup(2)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        print(
            f"--- attempt {attempt()}, process {os.getpid()}, {time.strftime('%F %T %z')}", file=sys.stderr, flush=True
        )

    def to_terminal(self) -> None:
        """Speak to the person again."""
        if self.terminal is not None:
            sys.stderr.flush()
            os.dup2(self.terminal, 2)


VOICE = Voice()


def enter() -> bool:
    """Begin as a worker, if a launcher started this process; False if the run has ended and there is nothing to do.

    Raises:
        InterruptedRun: the launcher was asked to stop before this process could be told.
    """
    adopt_slurm()
    folder = LaunchFolder.from_environment()
    if folder is None or not launched():
        return True
    if folder.outcome() is not None:
        return False
    folder.enter(int(os.environ["LOCAL_RANK"]))
    if folder.asked_to_stop():
        raise InterruptedRun(BEFORE_THE_FIRST_STEP)
    return True


@contextlib.contextmanager
def watching(timeout: float, describe: Callable[[str], None]) -> Iterator[Callable[[str, float], None]]:
    """Watch the other ranks; yields what is called with what is done next, and how many timeouts it may take.

    `describe` prints an error.
    """
    from quantune.distributed.watch import Board, Failure, Watch
    from quantune.distributed.world import World

    world = World.from_environment()

    def hung(sentence: str) -> None:
        mine = Failure(rank=world.rank, exit_code=EXIT_FAILURE, final=False)
        if Board(world).claim(mine) == mine:
            VOICE.to_terminal()
            describe(sentence)
        os._exit(EXIT_FAILURE)

    def ended(failure: Failure) -> None:
        os._exit(_settled(failure.exit_code, failure.final))

    with Watch(world, timeout, hung=hung, ended=ended) as watch:
        yield watch.beat


def end(error: BaseException, exit_code: int, speak: Speak) -> int:
    """End this process because of `error`; returns its exit code.

    `speak` is called where this is the process that tells the person.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        speak("")
        return _settled(exit_code, final=True) if launched() else exit_code
    import torch.distributed as dist

    from quantune.distributed.watch import Board, Failure
    from quantune.distributed.world import World

    world = World.from_environment()
    final = not isinstance(error, DistributedError) and not _lost_a_peer(error)
    try:
        board = Board(world, SECONDS_TO_HEAR)
        first = _wait_for_first(board, SECONDS_TO_HEAR if not final else DEFERENCE if world.rank else 0.0)
        if first is None and final:
            first = board.claim(Failure(rank=world.rank, exit_code=exit_code, final=True))
    except (dist.DistError, RuntimeError):  # the store is gone, with the launcher or rank 0
        first = Failure(rank=world.rank, exit_code=exit_code, final=True) if final and world.main else None
    if first is None:  # another process died: whoever started it knows more
        return EXIT_FAILURE
    if first.rank == world.rank and first.exit_code == exit_code:
        VOICE.to_terminal()
        speak(f"rank {world.rank}: " if world.rank else "")
    elif VOICE.terminal is not None:  # into the log; the person has heard of the first one
        print(f"ended after rank {first.rank}: {error!r}", file=sys.stderr, flush=True)
    return _settled(first.exit_code, first.final)


@contextlib.contextmanager
def run_folder(path: Path, mode: Mode) -> Iterator[RunFolder]:
    """The run folder, which rank 0 holds; the other ranks write their logs into it, and everything they say.

    Raises:
        RunFolderError: see `RunFolder.open`.
    """
    rank = int(os.environ["RANK"]) if launched() else 0
    if rank == 0:
        with RunFolder.open(path, mode) as folder:
            yield folder
        return
    folder = RunFolder(path)
    VOICE.to_log(folder.log(rank))
    yield folder


def _settled(exit_code: int, final: bool) -> int:
    """The exit code for quantune's launcher, which starts again what fails, or for another one."""
    folder = LaunchFolder.from_environment()
    if folder is None or not final:
        return exit_code
    folder.settle(exit_code)
    return 0


def _wait_for_first(board: Board, seconds: float) -> Failure | None:
    begun = time.monotonic()
    while (first := board.first()) is None and time.monotonic() - begun < seconds:
        time.sleep(0.1)
    return first


def _lost_a_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, as torch's backends put it."""
    import torch.distributed as dist

    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
