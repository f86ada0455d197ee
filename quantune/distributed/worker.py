"""The life of one process of a run with several: entering, watching the others, and ending with one voice.

The first process that fails speaks, with its rank; the others end with the same exit code and write to their logs. A
failure is final when it would come up again. Deaths and hangs are not: the launcher starts all processes again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from quantune.checkpoint.run_folder import Mode, RunFolder
from quantune.distributed.environment import adopt_slurm, attempt, launched, rank
from quantune.distributed.outcome import LaunchFolder
from quantune.distributed.stopping import BEFORE_THE_FIRST_STEP
from quantune.errors import EXIT_DIED, DistributedError, InputError, InterruptedRun

if TYPE_CHECKING:
    from quantune.distributed.watch import Board, Failure
    from quantune.distributed.world import World
    from quantune.recipe.schema import DistributedConfig

DEFERENCE = 2.0
"""Seconds that other ranks leave to rank 0 to report what all of them found."""
SECONDS_TO_HEAR = 5.0
"""How long a rank that lost another one waits to hear why."""
SECONDS_TO_LEARN = 60.0
"""How long a rank that hosts the store keeps it for others, which may still be importing."""

Speak = Callable[[str], object]
"""Tells the person, with something to put before it."""
Meaning = Callable[[BaseException], tuple[int, Speak]]
"""The exit code that an error stands for, and what prints it."""


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


def told_by_another() -> bool:
    """Whether another process, rank 0 or the launcher, says what all of them find before they meet."""
    return launched() and (rank() > 0 or LaunchFolder.from_environment() is not None)


def without_effect(config: DistributedConfig) -> Iterator[str]:
    """What was asked of quantune's launcher and does nothing, because another one started this process."""
    if not launched() or LaunchFolder.from_environment() is not None:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if config.processes not in ("auto", here):
        yield f"[distributed] processes = {config.processes} has no effect: the launcher started {here} on this machine"


@contextlib.contextmanager
def watching(timeout: float, describe: Callable[[str], None]) -> Iterator[Callable[[str, float], None]]:
    """Watch the other ranks; yields what is called with what is done next, and how many timeouts it may take.

    `describe` prints an error.
    """
    from quantune.distributed.watch import Failure, Hang, Watch
    from quantune.distributed.world import World

    world = World.from_environment()

    def hung(hang: Hang, board: Board) -> None:
        mine = Failure(rank=world.rank, exit_code=EXIT_DIED, final=False)
        first = board.claim(mine)
        if first == mine:
            VOICE.to_terminal()
            describe(hang.sentence)
            folder = LaunchFolder.from_environment()
            if folder is not None and hang.process is not None and hang.host == socket.gethostname():
                folder.end_hung(hang.process)  # torch's launcher would ask it first, and wait half a minute
        ended(first, board)

    def ended(failure: Failure, board: Board) -> None:
        exit_code = _settled(failure.exit_code, failure.final)
        _leave(world, board)
        os._exit(exit_code)

    with Watch(world, timeout, hung=hung, ended=ended, one_is_gone=_one_is_gone) as watch:
        yield watch.beat


def end(error: BaseException, meaning: Meaning) -> int:
    """End this process because of `error`; returns its exit code.

    What prints it is called where this is the process that tells the person.
    """
    exit_code, speak = meaning(error)
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        speak("")
        return _settled(exit_code, final=True)
    if isinstance(error, KeyboardInterrupt):  # perhaps in the middle of importing torch; all ranks get it
        if rank() == 0:
            speak("")
        return _settled(exit_code, final=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, and with a code that says why
    import torch.distributed as dist

    from quantune.distributed.watch import Board, Failure
    from quantune.distributed.world import World, hosts_store, keeps_store

    world = World.from_environment()
    lost = _lost_a_peer(error)
    if lost:
        exit_code, speak = meaning(DistributedError(f"lost another process of the run, or its machine: {error}"))
    mine = Failure(rank=world.rank, exit_code=exit_code, final=exit_code != EXIT_DIED)
    board: Board | None
    try:
        board = Board(world, SECONDS_TO_HEAR, host=hosts_store(world) and not keeps_store())
        first = _wait_for_first(board, lost * SECONDS_TO_HEAR + (world.rank > 0) * DEFERENCE)
        if first is None and not (lost and _one_is_gone()):
            first = board.claim(mine)
    except (dist.DistError, RuntimeError):  # the store is gone, with the launcher or rank 0, which has spoken
        board, first = None, mine if world.main and not lost else None
    if first == mine:
        VOICE.to_terminal()
        speak(f"rank {world.rank}: " if world.rank else "")
    else:
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
    if rank() == 0:
        with RunFolder.open(path, mode) as folder:
            yield folder
        return
    folder = RunFolder(path)
    VOICE.to_log(folder.log(rank()))
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
    while (first := board.first()) is None and time.monotonic() - begun < seconds and not _one_is_gone():
        time.sleep(0.1)
    return first


def _one_is_gone() -> bool:
    """Whether quantune's launcher has lost a worker of this machine: it tells of that."""
    folder = LaunchFolder.from_environment()
    return folder is not None and folder.lost_one()


def _leave(world: World, board: Board) -> None:
    """End knowing why; the process that hosts the store stays until all others do, or have had the time to."""
    from quantune.distributed.world import hosts_store, keeps_store

    try:
        gone = board.leave()
        begun = time.monotonic()
        seconds = SECONDS_TO_LEARN if keeps_store() else 3 * SECONDS_TO_HEAR
        while hosts_store(world) and gone < world.size and time.monotonic() - begun < seconds:
            time.sleep(0.1)
            gone = board.left()
    except RuntimeError:  # the store went first
        return


def _lost_a_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, as torch's backends put it."""
    import torch.distributed as dist

    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
