"""Commands of quantune in processes forked from this one, which has imported everything: seconds less than a start."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import faults
import torch.distributed as dist
import torchao  # noqa: F401  what publishing an adapter imports

import quantune.cli
import quantune.training.run  # noqa: F401  what a run imports

TIMEOUT = 60
"""Seconds after which a command counts as hung."""


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
        """What it wrote so far, to standard output and error."""
        return self.output.read_text(errors="replace")


@attrs.frozen(kw_only=True)
class Done:
    """A command that ended."""

    code: int
    said: str


@contextlib.contextmanager
def ranks(size: int, recipe: Path, *options: str, faults: Iterable[faults.Fault] = ()) -> Iterator[list[Command]]:
    """`quantune run` in `size` ranks, started as torchrun starts them; what is left of them at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "GLOO_SOCKET_IFNAME": "lo"}
    shared = {name: str(value) for name, value in world.items()}
    commands = [
        start(
            "run",
            recipe,
            *options,
            output=recipe.with_suffix(f".{rank}.out"),
            faults=faults,
            **{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    # made after the forks, which threads do not survive
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    try:
        yield commands
    finally:
        for command in commands:
            command.kill()
        del store


def quantune_ranks(size: int, recipe: Path, *options: str, faults: Iterable[faults.Fault] = ()) -> list[Done]:
    """The same to its end; what each rank says to the person."""
    with ranks(size, recipe, *options, faults=faults) as commands:
        return [command.end() for command in commands]


def start(
    *arguments: str | Path,
    output: Path,
    faults: Iterable[faults.Fault] = (),
    before: Callable[[], object] = lambda: None,
    **variables: str,
) -> Command:
    """Start `quantune` with `arguments`; `before` is called in the new process."""
    child = os.fork()
    if child:
        return Command(process=child, output=output)
    code = 1
    try:
        os.environ.update({"COLUMNS": "300", "NO_COLOR": "1", **variables})
        code = _main([str(argument) for argument in arguments], output, list(faults), before)
    finally:
        os._exit(code)


def quantune_run(recipe: Path, *options: str, **more: Any) -> Done:
    """`quantune run` to its end, with what it says in `run.out` beside the recipe."""
    return start("run", recipe, *options, output=recipe.with_suffix(".out"), **more).end()


def _main(arguments: list[str], output: Path, armed: list[faults.Fault], before: Callable[[], object]) -> int:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    sys.argv = ["quantune", *arguments]
    try:
        os.environ.update(faults.environment(armed))
        faults.install()
        before()
        quantune.cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
