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
from quantune.distributed.environment import adopt_slurm, attempt, has_store, launched
from quantune.distributed.outcome import LaunchFolder
from quantune.distributed.stopping import BEFORE_THE_FIRST_STEP
from quantune.errors import EXIT_FAILURE, DistributedError, InputError, InterruptedRun

if TYPE_CHECKING:
    from quantune.distributed.watch import Board, Failure
    from quantune.distributed.world import World

DEFERENCE = 2.0
"""Seconds that other ranks leave to rank 0 to report what all of them found."""
SECONDS_TO_HEAR = 5.0
"""How long a rank that lost another one waits to hear why."""
SECONDS_TO_LEARN = 30.0
"""How long rank 0 keeps the store for the others, which may be as late."""

SECONDS_TO_MEET = 60.0
"""How long a rank with something to say waits for rank 0, which may still be importing torch."""

Speak = Callable[[str], object]
"""Tells the person, with something to put before it."""


class LostRank(DistributedError):
    """Another process is gone; it, or whoever started it, knows why."""


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

    def note(self, text: str) -> None:
        """Write to the log, if there is one."""
        if self.terminal is not None:
            print(text, file=sys.stderr, flush=True)

    def to_terminal(self) -> None:
        """Speak to the person again."""
        if self.terminal is not None:
            sys.stderr.flush()
            os.dup2(self.terminal, 2)


VOICE = Voice()


def enter(*, launches: bool) -> bool:
    """Begin as a worker, if a launcher started this process; False if the run has ended and there is nothing to do.

    Args:
        launches: this process was told of machines, as a launcher is; then each of srun's tasks is one, not a worker.

    Raises:
        InputError: so was a worker that another launcher than quantune's started.
        InterruptedRun: the launcher was asked to stop before this process could be told.
    """
    folder = LaunchFolder.from_environment()
    if not launches:
        adopt_slurm()
    elif launched() and folder is None:
        raise InputError(
            f"a launcher has started this process already, as one of {os.environ['WORLD_SIZE']}: leave out --nodes, "
            "--node-rank and --rendezvous, or start quantune without it"
        )
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
    from quantune.distributed.watch import Failure, Watch
    from quantune.distributed.world import World

    world = World.from_environment()

    def hung(sentence: str, board: Board) -> None:
        mine = Failure(rank=world.rank, exit_code=EXIT_FAILURE, final=False)
        first = board.claim(mine)
        if first == mine:
            VOICE.to_terminal()
            describe(sentence)
        ended(first, board)

    def ended(failure: Failure, board: Board) -> None:
        exit_code = _settled(failure.exit_code, failure.final)
        _leave(world, board)
        os._exit(exit_code)

    with Watch(world, timeout, hung=hung, ended=ended) as watch:
        try:
            yield watch.beat
        except RuntimeError as error:
            if not _lost_a_rank(error):
                raise
            raise LostRank(f"the connection to another process of the run is gone: {error}") from error


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
    lost = isinstance(error, LostRank)
    mine = Failure(rank=world.rank, exit_code=exit_code, final=not isinstance(error, DistributedError))
    board = first = None
    try:
        board = Board(world, SECONDS_TO_HEAR if lost else SECONDS_TO_MEET)
        first = _wait_for_first(board, SECONDS_TO_HEAR if lost else DEFERENCE if world.rank else 0.0)
        if first is None and not lost:
            first = board.claim(mine)
    except (dist.DistError, RuntimeError):  # the store is gone, with the launcher or with rank 0, which has spoken
        pass
    if first == mine or (first is None and world.main and LaunchFolder.from_environment() is None):
        VOICE.to_terminal()
        speak(f"rank {world.rank}: " if world.rank else "")
    else:  # quantune's launcher tells of processes that died
        after = "another process died" if first is None else f"rank {first.rank} failed"
        VOICE.note(f"ended because {after}: {error!r}")
    ending = first or mine
    exit_code = _settled(ending.exit_code, ending.final)
    if board is not None:
        _leave(world, board)
    return exit_code


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


def _leave(world: World, board: Board) -> None:
    """End knowing why; rank 0 stays where it has the store that the others read that from, until they did."""
    begun = time.monotonic()
    try:
        gone = board.leave()
        while world.main and not has_store() and gone < world.size and time.monotonic() - begun < SECONDS_TO_LEARN:
            time.sleep(0.1)
            gone = board.left()
    except RuntimeError:  # the store went first
        return


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, as torch's backends put it."""
    import torch.distributed as dist

    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
