"""Weights of the kinds that break quantizers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("normal", "outliers", "zeros", "zero rows", "huge", "tiny", "subnormal", "constant")
"""normal: standard deviation 0.02. outliers: one weight in 15 is 100 times larger. zeros: nothing else. zero rows:
every other row, and half of one. huge, tiny, subnormal: multiplied by `MAGNITUDES`. constant: 0.1."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = {
    torch.float32: {"huge": 1e7, "tiny": 1e-6, "subnormal": 1e-38},
    torch.bfloat16: {"huge": 1e7, "tiny": 1e-6, "subnormal": 1e-38},
    torch.float16: {"huge": 1e5, "tiny": 1e-2, "subnormal": 1e-4},  # what its range allows
}


def make_weight(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, kind: str = "normal", seed: int = 0
) -> Tensor:
    """A weight of a kind, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "outliers":
        weight[::3, ::5] *= 100
    elif kind == "zeros":
        weight[:] = 0
    elif kind == "zero rows":
        weight[::2] = 0
        weight[1:2, : shape[1] // 2] = 0
    elif kind == "constant":
        weight[:] = 0.1
    return weight.mul_(MAGNITUDES[dtype].get(kind, 1.0)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference divided by the norm of `expected`; the largest difference where that is 0."""
    difference = found.double() - expected.double()
    norm = expected.double().norm().item()
    return difference.norm().item() / norm if norm else difference.abs().max().item()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and hold the same values; NaN equals NaN."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.nan_to_num(nan=math.pi), expected.nan_to_num(nan=math.pi))


def steps_apart(found: Tensor, expected: Tensor) -> int:
    """The largest distance of two bf16 or fp16 tensors in representable numbers (units in the last place)."""

    def ordered(values: Tensor) -> Tensor:
        bits = values.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)  # sign and magnitude to a number line

    return int((ordered(found) - ordered(expected)).abs().max().item())
