"""`quantune run` in forked processes: in one, or in several as torchrun starts them; with faults in them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faults
import forking
import torch.distributed as dist
from forking import Command, Done


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
    faults: Iterable[faults.Fault] = (),
    before: Callable[[], object] = lambda: None,
    **more: Any,
) -> Command:
    """Start `quantune` with `arguments` and armed faults; `before` is called in the new process."""
    armed = list(faults)
    return forking.start(*arguments, before=lambda: (_arm(armed), before()), **more)


def quantune_run(recipe: Path, *options: str, **more: Any) -> Done:
    """`quantune run` to its end, with what it says in `run.out` beside the recipe."""
    return start("run", recipe, *options, output=recipe.with_suffix(".out"), **more).end()


def _arm(armed: list[faults.Fault]) -> None:
    os.environ.update(faults.environment(armed))
    faults.install()
