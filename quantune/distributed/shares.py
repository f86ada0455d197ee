"""Dividing a model among ranks while it is loaded: no rank ever holds all of it.

Every rank reads the tensors of the checkpoint one after the other. Each is cut along its first dimension, as FSDP2
cuts it later. Of a dense tensor a rank keeps its own rows. A weight that is packed is packed by one rank, each in turn,
and its bytes are scattered; experts are packed by the ranks that hold them. A rank has at most one packed weight
waiting to be scattered, so what it holds at a time is its share, one weight, and one packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as distributed_empty

from quantune.distributed.world import COLLECTIVES, World
from quantune.errors import QuantizationError


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; if it is, every rank must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    COLLECTIVES.entered += 1
    return tensor.full_tensor()


@attrs.define(eq=False)
class _Waiting:
    """A packed weight that is not scattered yet."""

    name: str
    owner: int
    nbytes: int
    share: Tensor
    """This rank's share, to be filled."""
    data: Tensor | None
    """All bytes, on the owner."""
    error: Exception | None
    """Why there are none, on the owner."""


@attrs.define(kw_only=True, eq=False)
class Shares:
    """What this rank keeps of a model that is being loaded."""

    world: World
    mesh: DeviceMesh
    device: torch.device
    """Where weights are packed."""
    offload: bool = False
    """Keep the shares in the CPU's memory."""
    whole: Sequence[str] = ()
    """Names, or their beginnings, of modules whose weights every rank keeps whole until they are sharded."""
    _waiting: list[_Waiting] = attrs.field(init=False, factory=list)
    _loads: list[int] = attrs.field(init=False)
    """Bytes that each rank has packed."""

    def __attrs_post_init__(self) -> None:
        self._loads = [0] * self.world.size

    @property
    def kept_on(self) -> torch.device:
        """Where the shares are."""
        return torch.device("cpu") if self.offload else self.device

    def covers(self, name: str, parameter: Tensor) -> bool:
        """Whether a dense parameter is divided: vectors are too small to."""
        return parameter.dim() > 1 and not any(f"{name}.".startswith(f"{module}.") for module in self.whole)

    def own(self, count: int) -> range:
        """The rows that this rank keeps of `count` ones."""
        size = self._longest(count)
        start = min(self.world.rank * size, count)
        return range(start, min(start + size, count))

    def rows(self, tensor: Tensor) -> nn.Parameter:
        """This rank's rows of a tensor that every rank has."""
        own = self.own(tensor.shape[0])
        return self.of(tensor[own.start : own.stop].to(self.kept_on, copy=True), tensor.shape)

    def of(self, local: Tensor, shape: Sequence[int]) -> nn.Parameter:
        """A sharded parameter of the given global shape, of which this rank holds `local`."""
        if self.offload:
            hollow = distributed_empty(*shape, dtype=local.dtype, device_mesh=self.mesh, placements=[Shard(0)])
            # given a local tensor, torch would move it to the device of the mesh
            data: Any = torch.empty_like(hollow, device="cpu")
            data.to_local().copy_(local)
        else:
            stride = torch.empty(tuple(shape), device="meta").stride()
            data = DTensor.from_local(
                local.to(self.device), self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
        return nn.Parameter(data, requires_grad=False)

    def packed(self, name: str, nbytes: int, make: Callable[[], Tensor]) -> nn.Parameter:
        """This rank's share of `nbytes` packed bytes, uint8, that one rank makes. Its content comes later, at the
        latest with `finish`.

        Raises:
            QuantizationError: a rank could not pack a weight.
        """
        owner = min(range(self.world.size), key=lambda rank: (self._loads[rank], rank))
        if any(waiting.owner == owner for waiting in self._waiting):
            self._scatter()
        self._loads[owner] += nbytes
        data, error = None, None
        if owner == self.world.rank:
            try:
                data = make()
            except Exception as failure:  # whatever it is: the others wait for these bytes and must hear of it
                error = failure
        parameter = self.of(torch.empty(len(self.own(nbytes)), dtype=torch.uint8, device=self.kept_on), (nbytes,))
        share = parameter.data.to_local()  # type: ignore[attr-defined]  # a DTensor
        self._waiting.append(_Waiting(name, owner, nbytes, share, data, error))
        return parameter

    def finish(self) -> None:
        """Scatter what still waits. Every parameter has its content when this returns.

        Raises:
            QuantizationError: see `packed`.
        """
        self._scatter()

    def merged(self, values: dict[str, Any]) -> dict[str, Any]:
        """What each rank noted of the weights that it packed, by name, together."""
        together: dict[str, Any] = {}
        for noted in self.world.gather(values):
            together.update(noted)
        return together

    def _longest(self, count: int) -> int:
        return -(-count // self.world.size)

    def _scatter(self) -> None:
        waiting, self._waiting = self._waiting, []
        failed = next((one for one in waiting if one.error is not None), None)
        if self.world.any(failed is not None):
            self._raise(failed)
        for one in waiting:
            size = self._longest(one.nbytes)
            pieces = None
            if one.data is not None:
                padded = nn.functional.pad(one.data, (0, size * self.world.size - one.nbytes))
                pieces = list(padded.to(self.kept_on).split(size))
            received = torch.empty(size, dtype=torch.uint8, device=self.kept_on)
            COLLECTIVES.entered += 1
            dist.scatter(received, pieces, src=one.owner)
            one.share.copy_(received[: len(one.share)])

    def _raise(self, failed: _Waiting | None) -> None:
        reasons = self.world.gather(None if failed is None else f"{failed.name}: {failed.error}")
        if failed is not None and failed.error is not None:
            raise failed.error
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
        raise QuantizationError(f"rank {rank} could not pack {reason}")
