"""Packing and dequantizing the tiny formats: w = code * scale.

int8    codes from -127 to 127, one fp32 scale for the whole weight.
int4    codes from -7 to 7, two a byte with the even element in the low nibble; an fp32 scale per group of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.errors import QuantizationError
from quantune_tiny import GROUP_SIZES, TinyOptions

LARGEST = {"int8": 127, "int4": 7}


class TinyBackend(Backend):
    """Integers with few scales."""

    name = "tiny"

    def inner_tensors(self, shape: tuple[int, int], options: TinyOptions) -> Mapping[str, TensorSpec]:
        if options.weight_dtype == "int8":
            return {"codes": TensorSpec(torch.int8, shape), "scales": TensorSpec(torch.float32, (1,))}
        rows, columns = shape
        size = _group(shape, options)
        kernels.require_groups(columns, size, "group_size", GROUP_SIZES)
        return {
            "codes": TensorSpec(torch.uint8, (rows, columns // 2)),
            "scales": TensorSpec(torch.float32, (rows * columns // size,)),
        }

    def pack(self, weight: Tensor, options: TinyOptions) -> Mapping[str, Tensor]:
        groups = weight.float().view(-1, _group((weight.shape[0], weight.shape[1]), options))
        scales = groups.abs().amax(dim=1) / LARGEST[options.weight_dtype]
        divisors = torch.where(scales > 0, scales, 1.0)  # a group of zeros: its codes are zeros
        codes = (groups / divisors[:, None]).round_().to(torch.int8).view(weight.shape)
        if options.weight_dtype == "int4":
            codes = kernels.pack_nibbles(codes.view(torch.uint8) & 15, high_first=False)
        return {"codes": codes, "scales": scales}

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        options: TinyOptions = packed.layout.options  # type: ignore[assignment]  # a layout knows no backend's class
        views = packed.views()
        codes, scales = views["codes"].view(-1), views["scales"]
        size = _group(packed.layout.shape, options)
        if out is None:
            out = torch.empty(packed.layout.shape, dtype=dtype, device=packed.data.device)

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            if options.weight_dtype == "int4":
                kernels.decode_int4(codes, start, stop, chunk)
                kernels.scale_blocks_(chunk, scales[start // size :], size)
            else:
                chunk.copy_(codes[start:stop]).mul_(scales)

        return kernels.fill(out, decode, step=size if options.weight_dtype == "int4" else 1)

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        return True

    def export(self, packed: PackedWeight) -> dict[str, Tensor]:
        views = packed.views()
        return {"weight": views["codes"], "weight_scale": views["scales"]}

    def adopt(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: TinyOptions
    ) -> Mapping[str, Tensor]:
        if tensors.keys() != {"weight", "weight_scale"}:
            raise QuantizationError(f"expected the tensors weight and weight_scale, found {sorted(tensors)}")
        return {"codes": tensors["weight"], "scales": tensors["weight_scale"]}


def _group(shape: tuple[int, int], options: TinyOptions) -> int:
    """How many weights share one scale."""
    if options.weight_dtype == "int8":
        return math.prod(shape)
    size = options.resolved().group_size
    assert size is not None
    return size
