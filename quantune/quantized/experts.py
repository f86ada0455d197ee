"""Fused experts over packed weights.

Shape suffixes: S slots (token-expert pairs), T tokens, K experts per token, H hidden size, E experts; I in and O out
features of one weight, R rank of an update.

A mixture of experts keeps its weights as 3-D parameters, one slice an expert. Packed, such a parameter keeps its name
and becomes bytes, shape (experts, bytes of one expert): each expert is a packed weight (out features, in features) of
its own, whichever way round the architecture stores it, so every backend stores experts. One function, registered
with transformers, computes all of them, packed or not; only experts that a token was sent to are dequantized. A
low-rank update of a weight is added expert by expert as well, and never exists in full size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from quantune.quantized.linear import PackedLoraLinear, WeightFormat, packed_linear
from quantune.quantized.rounding import RoundedLoraLinear, Rounding

IMPLEMENTATION = "quantune"
"""The name under which transformers finds the function."""
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Weights that transformers' experts modules may have."""


def is_experts(module: nn.Module) -> bool:
    """Whether transformers lets other functions than its own compute this module."""
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "has_gate", "has_bias"))


def projections(module: nn.Module) -> dict[str, Tensor]:
    """The weights of an experts module by name."""
    parameters = dict(module.named_parameters(recurse=False))
    return {name: parameters[name] for name in PROJECTIONS if name in parameters}


def expert_shape(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """(out features, in features) of one expert of a 3-D weight."""
    _, first, second = weight.shape
    return (second, first) if module.is_transposed else (first, second)


def as_rows(module: nn.Module, expert: Tensor) -> Tensor:
    """One expert's weight as (out features, in features)."""
    return expert.T if module.is_transposed else expert


def weight_formats(module: nn.Module) -> dict[str, WeightFormat]:
    """The formats of the packed weights of a module, by name; empty where nothing is packed."""
    return getattr(module, "packed_formats", {})


def set_packed(module: nn.Module, name: str, weight_format: WeightFormat) -> nn.Parameter:
    """Replace the 3-D weight called `name` by bytes on the meta device, to be loaded."""
    count = projections(module)[name].shape[0]
    data = torch.empty(count, weight_format.layout.nbytes, dtype=torch.uint8, device="meta")
    parameter = nn.Parameter(data, requires_grad=False)
    module.register_parameter(name, parameter)
    module.packed_formats = {**weight_formats(module), name: weight_format}  # type: ignore[assignment]  # not a tensor
    return parameter


def round_updated(module: nn.Module, name: str, weight_format: WeightFormat, rounding: Rounding) -> None:
    """Compute with each expert's weight called `name`, packed or dense, and its update as `weight_format` rounds their
    sum, while `rounding` applies; there must be one update then."""
    module.rounded_updates = {**_rounded(module), name: (weight_format, rounding)}  # type: ignore[assignment]  # no tensor


def _rounded(module: nn.Module) -> dict[str, tuple[WeightFormat, Rounding]]:
    return getattr(module, "rounded_updates", {})


@attrs.frozen(kw_only=True, eq=False)
class ExpertsUpdate:
    """A low-rank update of one weight of all experts, scaling * B A for each."""

    lora_A: tuple[Tensor, ...]
    """One for each expert, (R, I)."""
    lora_B: tuple[Tensor, ...]
    """One for each expert, (O, R)."""
    scaling: float


@contextlib.contextmanager
def updated(module: nn.Module, name: str, updates: tuple[ExpertsUpdate, ...]) -> Iterator[None]:
    """Add `updates` to the weight called `name` while the context lasts."""
    outside = _updates(module)
    module.low_rank_updates = {**outside, name: updates}  # type: ignore[assignment]  # not a tensor
    try:
        yield
    finally:
        module.low_rank_updates = outside  # type: ignore[assignment]  # as above


def _updates(module: nn.Module) -> dict[str, tuple[ExpertsUpdate, ...]]:
    return getattr(module, "low_rank_updates", {})


@torch.compiler.disable  # how many tokens an expert gets is data: a graph can't hold it
def packed_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output, as transformers' own function for `module` gives it.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) int64; `num_experts` and above stand for no expert.
        top_k_weights: (T, K).
    """
    count: int = module.num_experts  # type: ignore[assignment]  # modules' attributes are typed as modules
    experts_S = top_k_index.reshape(-1)
    order_S = torch.argsort(experts_S, stable=True)
    counts = torch.bincount(experts_S.clamp_max(count), minlength=count + 1)[:count].tolist()
    sent = order_S[: sum(counts)]
    if not len(sent):
        return torch.zeros_like(hidden_states)
    # gathered at once: the gradient of each gathering is as large as all hidden states
    inputs = hidden_states[sent // top_k_index.shape[1]].split(counts)
    outputs = [_one_expert(module, expert, x) for expert, x in enumerate(inputs) if len(x)]
    # every slot is written once and summed in the order of the slots, so that the result is the same on every run
    results_SH = hidden_states.new_zeros(len(experts_S), hidden_states.shape[-1])
    results_SH = results_SH.index_copy_(0, sent, torch.cat(outputs).to(hidden_states.dtype))
    weighted_TKH = results_SH.view(*top_k_index.shape, -1) * top_k_weights[..., None]
    return weighted_TKH.sum(dim=1).to(hidden_states.dtype)


def _one_expert(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _project(module, first, expert, x)
    activate: Any = module._apply_gate if module.has_gate else module.act_fn
    hidden = activate(hidden)
    hidden = _project(module, "down_proj", expert, hidden)
    norm: Any = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return hidden if norm is None else norm(hidden)


def _project(module: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = module.get_parameter(name)[expert]
    bias = module.get_parameter(f"{name}_bias")[expert] if module.has_bias else None
    weight_format = weight_formats(module).get(name)
    updates = [(it.lora_A[expert], it.lora_B[expert], it.scaling) for it in _updates(module).get(name, ())]
    rounded_to, rounding = _rounded(module).get(name, (None, None))
    if updates and rounding is not None and rounding.applies(module):
        ((lora_A, lora_B, scaling),) = updates
        base = weight if weight_format is not None else as_rows(module, weight)
        return RoundedLoraLinear.apply(x, base, bias, lora_A, lora_B, None, scaling, rounded_to)
    if weight_format is not None and len(updates) == 1:
        return PackedLoraLinear.apply(x, weight, bias, *updates[0], weight_format)
    if weight_format is not None:
        y = packed_linear(x, weight, bias, weight_format)
    else:
        y = functional.linear(x, as_rows(module, weight), bias)
    for lora_A_RI, lora_B_OR, scaling in updates:
        y = y + (x @ lora_A_RI.to(x.dtype).T) @ lora_B_OR.to(x.dtype).T * scaling
    return y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, packed_experts)
