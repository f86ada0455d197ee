"""The processes that train together, and what they tell each other besides tensors of the model.

Everything here also works in a process that is alone, without a process group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quantune.distributed.environment import attempt, launched, launcher_has_store, meeting_point
from quantune.distributed.network import interface_towards
from quantune.errors import DistributedError


@attrs.define
class Collectives:
    """How many exchanges with other ranks this process has entered: who has entered fewer is waited for."""

    entered: int = 0


COLLECTIVES = Collectives()


@attrs.frozen(kw_only=True)
class World:
    """The processes of a run as one of them sees them."""

    rank: int = 0
    """This process among all, from 0."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """This process among those of its machine, from 0."""
    local_size: int = 1
    """Processes on this machine."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """The world that a launcher (torchrun, quantune itself) describes in `environment`; alone where none does."""
        if not launched(environment):
            return cls()
        size = int(environment["WORLD_SIZE"])
        return cls(
            rank=int(environment["RANK"]),
            size=size,
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        )

    @property
    def main(self) -> bool:
        """Whether this process speaks, and writes what there is one of: rank 0."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank, on all of them."""
        if self.size == 1:
            return [value]
        COLLECTIVES.entered += 1
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """As `gather`, for equally many numbers from each; cheap enough for every step."""
        if self.size == 1:
            return [list(numbers)]
        COLLECTIVES.entered += 1
        mine = torch.tensor(numbers, dtype=torch.float64)
        all_of_them = torch.empty(self.size, len(numbers), dtype=torch.float64)
        dist.all_gather(list(all_of_them.unbind()), mine)
        return all_of_them.tolist()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """What the process `source` gave, on all of them."""
        if self.size == 1:
            return value
        COLLECTIVES.entered += 1
        values = [value]
        dist.broadcast_object_list(values, src=source)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all of them get the same answer."""
        return any(row[0] for row in self.gather_numbers([float(flag)]))


@contextlib.contextmanager
def joined(
    world: World, device: torch.device, timeout: timedelta, *, alone: bool = False
) -> Iterator[DeviceMesh | None]:
    """Hold the process group of `world` for the length of the context, over gloo, and nccl for tensors on a GPU.

    Yields the mesh that a model is sharded over; None for a process that is alone, unless `alone` asks for a group of
    one.

    Raises:
        DistributedError: the other processes did not come.
    """
    if world.size == 1 and not alone:
        yield None
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    host, port = meeting_point() if world.size > 1 else ("", 0)
    if world.size > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(host, elsewhere=world.local_size < world.size)
        if interface is not None:  # by itself gloo takes what the host's own name stands for, if it does for anything
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        dist.init_process_group(
            backend, store=_store(world, timeout), rank=world.rank, world_size=world.size, timeout=timeout
        )
    except dist.DistError as error:
        raise DistributedError(
            f"expected {world.size} processes to meet at {host}:{port} "
            f"within {timeout.total_seconds():g} seconds, they did not: {str(error).splitlines()[0]}"
        ) from error
    whole = False
    try:
        yield init_device_mesh(device.type, (world.size,))
        COLLECTIVES.entered += 1
        dist.barrier()  # one that is done early would close connections that others still use
        whole = True
    finally:
        if whole or world.size == 1:  # else this process ends: nccl could wait here for ranks that wait for this one
            dist.destroy_process_group()


_KEPT: list[dist.Store] = []
"""The store that this process hosts, until it ends: the others read there why the run did."""


def hosts_store(world: World) -> bool:
    """Whether this process has the store where the ranks meet, because what launched it has none."""
    return world.main and not launcher_has_store()


def keeps_store() -> bool:
    """Whether this process has begun to host the store."""
    return bool(_KEPT)


def _store(world: World, timeout: timedelta) -> dist.Store:
    """Where the processes find each other: at MASTER_ADDR, as torch's `env://`."""
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    if hosts_store(world):
        _KEPT.append(store)
    # the store outlives an attempt, and the keys of processes that died in it
    return dist.PrefixStore(f"/attempt/{attempt()}", store)
