"""Starting the processes of a run on this machine, with torch's elastic launcher, and what becomes of them.

Signals are ours, not the launcher's: a request to stop is passed on to the workers, which agree on a step, save and
end by themselves, however long that takes. A worker that dies (killed, out of memory, hung) is started again together
with all others, up to `max_restarts` times; one that ends for a reason that would come up again says so in the launch
folder and is not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from quantune.distributed.outcome import FOLDER, LaunchFolder
from quantune.distributed.watch import LOADING_PATIENCE
from quantune.errors import EXIT_ABORTED, EXIT_DIED, DistributedError, InputError, InterruptedRun, QuantuneError
from quantune.recipe.schema import DistributedConfig

OWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEFT_TO_TORCH = "SIGQUIT"
"""The signals that the elastic launcher may handle in its own way; it wants at least one."""
SECONDS_TO_HANDLE = 2.0
"""How long Python takes at most to call a handler, unless it is in a call that does not return."""
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


def launch(
    arguments: Sequence[str],
    processes: int,
    nodes: Nodes,
    config: DistributedConfig,
    describe: Callable[[QuantuneError], object],
) -> int:
    """Run Python with `arguments` in so many processes on this machine, and return the exit code of the run.

    `describe` prints an error where it can't be raised.

    Raises:
        DistributedError: a process died, and not for the first time; or the machines did not find each other.
        KeyboardInterrupt: asked to stop a second time.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happened is said here, once
    with tempfile.TemporaryDirectory(prefix="quantune-") as path:
        folder = LaunchFolder(Path(path))
        folder.launch()
        settings = _settings(processes, nodes, config, folder)
        try:
            with _environment(processes, folder), _passing_on_signals(folder, describe):
                elastic_launch(LaunchConfig(**settings), sys.executable)(*arguments)
        except ChildFailedError as error:
            if folder.outcome() is None:
                raise DistributedError(_deaths(error, config.max_restarts, folder)) from error
        except (RendezvousError, torch.distributed.DistError, TimeoutError) as error:
            if folder.outcome() is None:
                raise DistributedError(_apart(nodes, error)) from error
        return folder.outcome() or 0


@contextlib.contextmanager
def _environment(processes: int, folder: LaunchFolder) -> Iterator[None]:
    """What workers find in their environment besides what torch's launcher tells them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    os.environ[FOLDER] = str(folder.path)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _settings(processes: int, nodes: Nodes, config: DistributedConfig, folder: LaunchFolder) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "min_nodes": nodes.count,
        "max_nodes": nodes.count,
        "nproc_per_node": processes,
        "run_id": "quantune",
        "max_restarts": config.max_restarts,
        "signals_to_handle": LEFT_TO_TORCH,
        "rdzv_configs": {"timeout": math.ceil(LOADING_PATIENCE * config.timeout)},
        "logs_specs": DefaultLogsSpecs(log_dir=str(folder.path)),  # by default it leaves folders behind in /tmp
    }
    if nodes.count == 1:
        # not by the name of this machine, which may stand for nothing
        settings.update(rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost")
    else:
        settings.update(rdzv_backend="static", rdzv_endpoint=nodes.rendezvous)
        settings["rdzv_configs"]["rank"] = nodes.rank
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        settings["shutdown_timeout"] = END_SECONDS
    return settings


@contextlib.contextmanager
def _passing_on_signals(folder: LaunchFolder, describe: Callable[[QuantuneError], object]) -> Iterator[None]:
    """Pass a request to stop on to the workers; the second Ctrl-C kills them."""
    asked: list[int] = []
    handled = threading.Semaphore(0)
    waking, woken = socket.socketpair()

    def pass_on(number: int, frame: FrameType | None) -> None:
        handled.release()
        if number == signal.SIGINT and signal.SIGINT in asked:
            folder.settle(EXIT_ABORTED)
            folder.signal(signal.SIGKILL)
            raise KeyboardInterrupt
        asked.append(number)
        folder.ask_to_stop(number)

    def give_up_waiting() -> None:
        """End this process if the main thread can't: it is in a call of torch that waits for other machines.

        There are no workers then.
        """
        while woken.recv(1)[0] in OWN_SIGNALS:
            if not handled.acquire(timeout=SECONDS_TO_HANDLE):
                stopped = InterruptedRun("stopped while waiting for the other machines; the same command goes on")
                describe(stopped)
                shutil.rmtree(folder.path, ignore_errors=True)
                os._exit(stopped.exit_code)

    waking.setblocking(False)
    thread = threading.Thread(target=give_up_waiting, daemon=True)
    previous = {number: signal.signal(number, pass_on) for number in OWN_SIGNALS}
    wakeup = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        waking.send(b"\0")
        thread.join()


def _apart(nodes: Nodes, error: Exception) -> str:
    """A sentence on machines that did not find each other."""
    if "EADDRINUSE" in str(error):
        return f"the port of {nodes.rendezvous} is in use on this machine: give all machines another --rendezvous"
    return (
        f"the {nodes.count} machines did not find each other at {nodes.rendezvous}, or lost machine 0 there: {error}. "
        "Each of them must run the same command with a --node-rank of its own, and reach that address"
    )


def _deaths(error: ChildFailedError, restarts: int, folder: LaunchFolder) -> str:
    """A sentence on the workers that died of themselves, rather than of the others."""
    failures = dict(error.failures)
    killed = {rank: one for rank, one in failures.items() if one.exitcode < 0 and one.exitcode != -signal.SIGTERM}
    rank, failure = next(iter((killed or failures).items()))
    tries = f" in the last of {restarts + 1} attempts" if restarts else ""
    return (
        f"rank {rank} (process {failure.pid}) {_how(failure, folder)}{tries}. --resume goes on from the last "
        "checkpoint; what ranks above 0 wrote is in logs/ of the run folder"
    )


def _how(failure: ProcessFailure, folder: LaunchFolder) -> str:
    if folder.hung(failure.pid):
        return "was ended because it hung"
    if failure.exitcode == -signal.SIGKILL:
        return "was killed by SIGKILL (perhaps the system had run out of memory)"
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    if failure.exitcode == EXIT_DIED:
        return "ended after another process had"
    return f"ended with exit code {failure.exitcode}"
