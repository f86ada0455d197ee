"""Sharding a model over ranks with FSDP2.

Every block is a unit: its parameters are gathered when it runs, forward and backward, and let go afterwards. What is
gathered of a packed weight is its bytes. What no block holds (embeddings, norms, the output head) forms the root's
unit, gathered for a forward pass and the backward one after it; a frozen embedding of its own is a unit of its own, and
is not needed backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from quantune.distributed.world import COLLECTIVES
from quantune.errors import ModelError

Result = TypeVar("Result")
# torch 2.13 renames them
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Root(nn.Module):
    """A model whose parameters outside of blocks are whole while a function runs that is called through this module.

    The loss takes a model's backbone and head apart, generating calls the model again and again: neither is the one
    forward pass that FSDP hooks into, and this is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.traffic = Traffic()
        """What sharding this model costs in communication."""

    def forward(self, function: Callable[..., Result], *arguments: Any, **more: Any) -> Result:
        return function(*arguments, **more)

    def reshard(self) -> None:
        """Let go of what was gathered for a pass that had no backward one."""
        if isinstance(self, FSDPModule):
            for module in self.modules():
                if isinstance(module, FSDPModule):
                    FSDPModule.reshard(module)


@attrs.define
class Traffic:
    """Bytes that this rank received since it was last asked."""

    gathered: int = 0
    """Of parameters, from other ranks."""
    reduced: int = 0
    """Of gradients, from other ranks."""

    def take(self) -> int:
        """All bytes so far; counting begins again."""
        total = self.gathered + self.reduced
        self.gathered = self.reduced = 0
        return total


def shard(root: Root, mesh: DeviceMesh, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Shard the model in `root`, which computes on `device`, over `mesh`, in place. Parameters that are sharded already
    stay the shares they are.

    Raises:
        ModelError: the model has no blocks, or what is trained has several dtypes.
    """
    _require_one_dtype(root)
    shares = _take_shares(root)
    for _, _, parameter in _parameters(root):
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)  # an adapter is where the share of its layer is
    pinned = torch.cuda.is_available()
    policy = CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy()
    embeddings = _lone_embedding(root.model)
    for unit in (*blocks(root.model), *embeddings, root):
        fully_shard(unit, mesh=mesh, offload_policy=policy)
    units: list[Any] = [*blocks(root.model), *embeddings, root]  # each is an FSDPModule as well now
    for embedding in embeddings:
        embedding.set_unshard_in_backward(False)
    for unit in units:
        # a sum, for each rank's loss is divided by the targets of all
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(_CountedAllGather(root.traffic))  # type: ignore[arg-type]  # has what torch calls
        unit.set_custom_reduce_scatter(_CountedReduceScatter(root.traffic))  # type: ignore[arg-type]  # as above
    for parameter, owners in shares:
        for module, name in owners:
            module.register_parameter(name, parameter)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, its outermost repeated layers.

    Raises:
        ModelError: it has none that are known as such.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if not found:
        longest = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=())
        found = list(longest)
    if not found:
        raise ModelError(f"{type(model).__name__} has no blocks that could be shared among several processes; use one")
    return found


def _lone_embedding(model: nn.Module) -> list[Any]:
    """The input embedding where it is frozen and shares its weight with nothing."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    embedding = inner.get_input_embeddings()
    weights = {id(parameter) for parameter in embedding.parameters()}
    trained = any(parameter.requires_grad for parameter in embedding.parameters())
    shared = any(
        id(parameter) in weights
        for module in model.modules()
        if module not in set(embedding.modules())
        for parameter in module.parameters(recurse=False)
    )
    return [] if trained or shared or not isinstance(embedding, nn.Embedding) else [embedding]


def _require_one_dtype(root: Root) -> None:
    """FSDP reduces the gradients of a unit together."""
    trained = {name: parameter.dtype for name, parameter in root.named_parameters() if parameter.requires_grad}
    odd = [name for name, dtype in trained.items() if dtype != torch.float32]
    if odd:
        raise ModelError(
            f"several processes train parameters of one dtype, torch.float32, and {odd[0].removeprefix('model.')} is "
            f'{trained[odd[0]]}: set [training] precision = "fp32", [adapter] bias to another value, or '
            "[distributed] processes = 1"
        )


Owners = list[tuple[nn.Module, str]]


def _take_shares(root: Root) -> list[tuple[nn.Parameter, Owners]]:
    """Take the sharded parameters out, each with the modules that hold it, and leave their shapes."""
    owners: dict[int, Owners] = {}
    shares: dict[int, nn.Parameter] = {}
    for module, name, parameter in _parameters(root):
        if isinstance(parameter, DTensor):
            owners.setdefault(id(parameter), []).append((module, name))
            shares[id(parameter)] = parameter
    for key, parameter in shares.items():
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        hollow = nn.Parameter(shape, requires_grad=False)  # the same one where a weight is shared
        for module, name in owners[key]:
            module.register_parameter(name, hollow)
    return [(shares[key], owners[key]) for key in shares]


def _parameters(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


class _CountedAllGather:
    """torch's all-gather, counted."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        COLLECTIVES.entered += 1
        self.traffic.gathered += output_tensor.nbytes - input_tensor.nbytes
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _CountedReduceScatter:
    """torch's reduce-scatter, counted."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        COLLECTIVES.entered += 1
        self.traffic.reduced += input_tensor.nbytes - output_tensor.nbytes
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
