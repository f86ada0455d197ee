"""Training a small model over packed weights, in one process and on two ranks under FSDP2.

The two ranks are processes that stay and take one job after the other, because starting them costs more than a job.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantune.backends.backend import Backend, pack_weight
from quantune.quantized.linear import PackedLoraLinear
from quantune.testing.case import layer_of
from quantune.testing.weights import make_weight

WORLD_SIZE = 2
ROWS = 8
STEPS = 3
TIMEOUT = 90
"""Seconds that a job may take, starting the processes included."""


@attrs.frozen(kw_only=True)
class Job:
    """What to train over."""

    backend: Backend
    options: Any
    shape: tuple[int, int]


class AdaptedLinear(nn.Module):
    """A packed linear layer with a trainable low-rank update."""

    def __init__(self, job: Job, seed: int) -> None:
        super().__init__()
        out_features, in_features = job.shape
        packed = pack_weight(job.backend, make_weight(job.shape, seed=seed), job.options)
        self.base = layer_of(job.backend, packed)
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(torch.randn(4, in_features, generator=generator) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(out_features, 4, generator=generator) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return PackedLoraLinear.apply(x, self.base.weight, None, self.lora_A, self.lora_B, 1.0, self.base.weight_format)


class Model(nn.Module):
    """Two adapted layers of one shape, added up."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdaptedLinear(job, seed) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def train(job: Job) -> list[float]:
    """Losses of a few steps over all rows; on a rank, over its share of them, averaged over the ranks."""
    model = Model(job)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, job.shape[1], generator=generator)
    target = torch.randn(ROWS, job.shape[0], generator=generator)
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        x, target = (rows.chunk(WORLD_SIZE)[dist.get_rank()] for rows in (x, target))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reported = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(reported)
            reported /= WORLD_SIZE
        losses.append(reported.item())
    return losses


class TwoRanks:
    """Two processes in one gloo group, started by the first job and stopped at the end or by a failure."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> TwoRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, pickled: bytes) -> list[list[float]]:
        """Losses of a pickled `Job`, by rank.

        Raises:
            RuntimeError: a rank failed, with its traceback, or took too long.
        """
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send_bytes(pickled)
            return self._receive()
        except (RuntimeError, OSError, EOFError):
            self.close()  # the other rank may wait for this one; the next job starts afresh
            raise

    def close(self) -> None:
        """Stop the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="quantune-ranks-")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _receive(self) -> list[list[float]]:
        losses: dict[int, list[float]] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(losses) < WORLD_SIZE:
            missing = [one for rank, one in enumerate(self._connections) if rank not in losses]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted({0, 1} - set(losses))} have not finished after {TIMEOUT} seconds")
            for connection in self._connections:
                if connection in ready:
                    rank, answer = self._connections.index(connection), connection.recv()
                    if isinstance(answer, str):
                        raise RuntimeError(f"rank {rank} failed:\n{answer}")
                    losses[rank] = answer
        return [losses[rank] for rank in range(WORLD_SIZE)]


def _serve(rank: int, folder: str, connection: Connection) -> None:
    """Take jobs until the connection closes."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            pickled = connection.recv_bytes()
        except EOFError:
            break
        try:
            answer: list[float] | str = train(pickle.loads(pickled))
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)
    dist.destroy_process_group()
