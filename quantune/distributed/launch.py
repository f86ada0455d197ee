"""Starting the processes of a run on this machine, with torch's elastic launcher, and what becomes of them.

Signals are ours, not the launcher's: a request to stop is passed on to the workers, which agree on a step, save and
end by themselves, however long that takes. A worker that dies (killed, out of memory, hung) is started again together
with all others, up to `max_restarts` times; one that ends for a reason that would come up again says so in the launch
folder and is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from quantune.distributed.outcome import FOLDER, LaunchFolder
from quantune.errors import DistributedError, InputError
from quantune.recipe.schema import DistributedConfig

OWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEFT_TO_TORCH = "SIGQUIT"
"""The signals that the elastic launcher may handle in its own way; it wants at least one."""
END_SECONDS = 10
"""How long torch waits for the workers of an attempt that failed to end before it kills them."""


@attrs.frozen(kw_only=True)
class Nodes:
    """The machines of a run."""

    count: int = 1
    rank: int = 0
    """This machine among them, from 0."""
    rendezvous: str | None = None
    """HOST:PORT of machine 0, where they find each other."""

    def __attrs_post_init__(self) -> None:
        if self.count > 1 and self.rendezvous is None:
            raise InputError("--nodes needs --rendezvous HOST:PORT, where machine 0 can be reached by all of them")
        if self.count == 1 and (self.rendezvous is not None or self.rank):
            raise InputError("--node-rank and --rendezvous are for several machines: give --nodes as well")
        if not 0 <= self.rank < self.count:
            raise InputError(f"expected --node-rank to be from 0 to {self.count - 1}, found {self.rank}")
        if self.rendezvous is not None and not _is_host_and_port(self.rendezvous):
            raise InputError(f"expected --rendezvous to be HOST:PORT, found {self.rendezvous}")


def _is_host_and_port(text: str) -> bool:
    found = re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", text)
    return found is not None and 0 < int(found[1]) < 2**16


def local_processes(config: DistributedConfig, device: str) -> int:
    """How many processes this machine is to have."""
    if isinstance(config.processes, int):
        return config.processes
    return max(1, torch.cuda.device_count()) if device != "cpu" else 1


def launch(arguments: Sequence[str], processes: int, nodes: Nodes, config: DistributedConfig) -> int:
    """Run `python -m quantune` with `arguments` in so many processes on this machine, and return the exit code.

    Raises:
        DistributedError: a process died, and not for the first time; or the machines did not find each other.
        KeyboardInterrupt: asked to stop a second time.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happened is said here, once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="quantune-") as path:
        folder = LaunchFolder(Path(path))
        os.environ[FOLDER] = path
        settings = _settings(processes, nodes, config)
        try:
            with _passing_on_signals(folder):
                elastic_launch(LaunchConfig(**settings), sys.executable)("-m", "quantune", *arguments)
        except ChildFailedError as error:
            if folder.outcome() is None:
                raise DistributedError(_deaths(error, config.max_restarts, folder)) from error
        except (RendezvousError, torch.distributed.DistError, TimeoutError) as error:
            if folder.outcome() is None:
                raise DistributedError(
                    f"the {nodes.count} machines did not find each other at {nodes.rendezvous}: {error}. Each of them "
                    "must run the same command with a --node-rank of its own, and reach that address"
                ) from error
        return folder.outcome() or 0


def _settings(processes: int, nodes: Nodes, config: DistributedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "min_nodes": nodes.count,
        "max_nodes": nodes.count,
        "nproc_per_node": processes,
        "run_id": "quantune",
        "max_restarts": config.max_restarts,
        "signals_to_handle": LEFT_TO_TORCH,
        "rdzv_configs": {"timeout": int(config.timeout)},
    }
    if nodes.count == 1:
        settings.update(rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="127.0.0.1")
    else:
        settings.update(rdzv_backend="static", rdzv_endpoint=nodes.rendezvous)
        settings["rdzv_configs"]["rank"] = nodes.rank
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        settings["shutdown_timeout"] = END_SECONDS
    return settings


@contextlib.contextmanager
def _passing_on_signals(folder: LaunchFolder) -> Iterator[None]:
    """Pass a request to stop on to the workers; the second Ctrl-C kills them."""
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            folder.settle(130)
            folder.signal(signal.SIGKILL)
            raise KeyboardInterrupt
        asked.append(number)
        folder.ask_to_stop(number)

    previous: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, pass_on) for number in OWN_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _deaths(error: ChildFailedError, restarts: int, folder: LaunchFolder) -> str:
    """A sentence on the workers that died of themselves, rather than of the others."""
    failures = dict(error.failures)
    killed = {rank: one for rank, one in failures.items() if one.exitcode < 0 and one.exitcode != -signal.SIGTERM}
    rank, failure = next(iter((killed or failures).items()))
    again = f", after {restarts} restarts" if restarts else ""
    return (
        f"rank {rank} (process {failure.pid}) {_how(failure)}{again}; --resume goes on from the last checkpoint. "
        "What it wrote is in logs/ of the run folder"
    )


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return "was killed by SIGKILL: the system may have run out of memory"
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}"
