"""Running a function in several processes that form one world, forked from this one, which has imported everything."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

from quantune.distributed.world import World

TIMEOUT = 120
"""Seconds until ranks that have not answered count as hung."""


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns on each of `size` ranks.

    Raises:
        RuntimeError: a rank failed, with its traceback; the first that did.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    gc.collect()  # process groups that were used here live on in cycles, with threads that no child has
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(rank, size, port, theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers: dict[int, Any] = {}
        while len(answers) < size:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], timeout=TIMEOUT)
            if not ready:
                raise RuntimeError(f"of {size} ranks only {sorted(answers)} answered in {TIMEOUT} seconds")
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    answer, error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    processes[rank].join()
                    answer, error = None, f"it died, exit code {processes[rank].exitcode}"
                if error is not None:
                    raise RuntimeError(f"rank {rank} of {size} failed:\n{error}")
                answers[rank] = answer
        return [answers[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == size else 0)
            process.kill()
            process.join()


def _serve(rank: int, size: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    try:
        answer = function(World.from_environment(), *arguments), None
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))  # not `send`: tensors would stay in this process's memory
