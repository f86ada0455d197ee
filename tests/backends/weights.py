"""Weights of the kinds that break quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("normal", "outliers", "zero", "zero rows", "huge", "tiny", "subnormal", "constant")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
    """A random weight of a kind; what a dtype can't hold is clamped to its range."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    if kind == "outliers":
        weight[::3, ::5] *= 100
    if kind == "zero":
        weight[:] = 0
    if kind == "zero rows":
        weight[::2] = 0
        weight[1, : shape[1] // 2] = 0
    if kind == "huge":
        weight *= 1e7
    if kind == "tiny":
        weight *= 1e-6
    if kind == "subnormal":
        weight *= 1e-38
    if kind == "constant":
        weight[:] = 0.125
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)
