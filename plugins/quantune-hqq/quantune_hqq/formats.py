"""Packing and dequantizing: codes in groups along a row, each group with a scale (bf16) and a zero point (fp16).

    weight = (code - zero) * scale

computed in fp32 from the stored numbers. The scale spans the group from its smallest to its largest weight; it is
rounded before the codes are chosen, so they make up for the rounding. Rounded to bf16 it has the range of fp32, which
fp16 scales lack. The zero point is fitted by `solver`. In codes centred around 0 it is small, and fp16's eleven bits
place it within 1/256 of a step (int4) to 1/32 (int8).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.errors import QuantizationError
from torch import Tensor

from quantune_hqq import SUGGESTED_GROUP_SIZES, HqqOptions, codes, solver

SMALLEST_SCALE = 2.0**-126
"""The smallest normal number of bf16."""
LARGEST_ZERO = 2.0**15
"""In steps. A group that is narrow and far from 0 gets a wider scale: its zero point must stay within fp16 (65504)."""
FITTED_AT_ONCE = {"cpu": 1 << 18}
"""Weights fitted at a time: on a CPU, few enough that the temporaries stay in its cache."""


class HqqBackend(Backend):
    """Half-quadratic quantization."""

    name = "hqq"

    def inner_tensors(self, shape: tuple[int, int], options: HqqOptions) -> Mapping[str, TensorSpec]:
        out_features, in_features = shape
        kernels.require_groups(in_features, options.group_size, "group_size", SUGGESTED_GROUP_SIZES)
        groups = (out_features, in_features // options.group_size)
        return {
            **codes.code_tensors(shape, codes.BITS[options.weight_dtype]),
            "scale": TensorSpec(torch.bfloat16, groups),
            "zero": TensorSpec(torch.float16, groups),
        }

    def pack(self, weight: Tensor, options: HqqOptions) -> Mapping[str, Tensor]:
        size, bits = options.group_size, codes.BITS[options.weight_dtype]
        at_once = FITTED_AT_ONCE.get(weight.device.type, kernels.PACKED_AT_ONCE)
        slices = weight.reshape(-1, size).split(max(1, at_once // size))
        parts = [_pack_groups(part.float(), bits, options) for part in slices]
        values, scale, zero = (torch.cat(one) for one in zip(*parts, strict=True))
        rows = weight.shape[0]
        return {
            **codes.pack_codes(values.view(rows, -1), bits),
            "scale": scale.view(rows, -1),
            "zero": zero.view(rows, -1),
        }

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        layout = packed.layout
        options: HqqOptions = layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        size, bits, views = options.group_size, codes.BITS[options.weight_dtype], packed.views()
        scale, zero = (views[name].view(-1, 1).float() for name in ("scale", "zero"))
        if out is None:
            out = torch.empty(layout.shape, dtype=dtype, device=packed.data.device)

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            codes.decode(views, bits, start, stop, chunk)
            groups = slice(start // size, stop // size)
            chunk.view(-1, size).sub_(zero[groups]).mul_(scale[groups])

        return kernels.fill(out, decode, step=size)

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        return True

    def adopt(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: HqqOptions) -> Mapping[str, Tensor]:
        for name in ("scale", "zero"):
            if name in tensors and not torch.isfinite(tensors[name]).all():
                raise QuantizationError(f"its {name} holds NaN or infinity; the checkpoint is damaged")
        return tensors


def _pack_groups(groups: Tensor, bits: int, options: HqqOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int8, as shaped), scales and zero points (one a group) of fp32 groups, shape (groups, group size)."""
    low, high = codes.limits(bits)
    smallest, largest = groups.amin(dim=1), groups.amax(dim=1)
    steps = high - low
    span = largest / steps - smallest / steps  # their difference may be too large for fp32
    scale = span.maximum(torch.maximum(-smallest, largest) / LARGEST_ZERO).clamp_min_(SMALLEST_SCALE).bfloat16()
    scaled = groups / scale.float()[:, None]
    zero = solver.fit_zeros(
        scaled,
        _as_stored(low - scaled.amin(dim=1)),
        low=low,
        high=high,
        iterations=options.iterations,
        lp_norm=options.lp_norm,
        rounded=_as_stored,
    )
    ends = torch.stack([(low - zero) * scale, (high - zero) * scale])
    if not torch.isfinite(ends).all():
        raise QuantizationError("its values are too large: what they are stored as leaves the range of fp32")
    values = scaled.add_(zero[:, None]).round_().clamp_(low, high).to(torch.int8)
    return values, scale, zero.half()


def _as_stored(zeros: Tensor) -> Tensor:
    return zeros.half().float()
