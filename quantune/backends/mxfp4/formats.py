"""Packing and dequantizing MXFP4 (OCP Microscaling Formats 1.0, sections 5.3 and 6.3).

E2M1 codes, two a byte with the even element in the low nibble, and one E8M0 scale 2^(byte - 127) per 32 weights of a
row. The scale is the largest power of two not above the largest magnitude, divided by 4, so magnitudes above 6 times
the scale become 6.

A checkpoint (gpt-oss) holds a weight as blocks, uint8 (out features, in features / 32, 16), and scales, uint8
(out features, in features / 32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.backends.mxfp4 import Mxfp4Options
from quantune.backends.mxfp4.reader import Mxfp4Reader
from quantune.errors import QuantizationError

BLOCK = 32
BIAS = 127
LARGEST_POWER = 2
"""The exponent of the largest power of two that E2M1 holds: 4."""
NOT_A_SCALE = 255
"""The E8M0 code of NaN."""


class Mxfp4Backend(Backend):
    """OCP microscaling 4-bit floats."""

    name = "mxfp4"

    def inner_tensors(self, shape: tuple[int, int], options: Mxfp4Options) -> Mapping[str, TensorSpec]:
        out_features, in_features = shape
        if in_features % BLOCK:
            raise QuantizationError(f"mxfp4 stores rows in blocks of {BLOCK}, which do not divide its {in_features}")
        return {
            "blocks": TensorSpec(torch.uint8, (out_features, in_features // 2)),
            "scales": TensorSpec(torch.uint8, (out_features, in_features // BLOCK)),
        }

    def pack(self, weight: Tensor, options: Mxfp4Options) -> Mapping[str, Tensor]:
        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            groups = rows.float().unflatten(1, (-1, BLOCK))
            bits = groups.abs().amax(dim=2).view(torch.int32)
            exponent = ((bits >> 23) - BIAS - LARGEST_POWER).clamp_min_(-BIAS)
            scaled = torch.ldexp(groups, -exponent[:, :, None])
            codes = kernels.encode_e2m1(scaled.flatten(1))
            return kernels.pack_nibbles(codes, high_first=False), (exponent + BIAS).to(torch.uint8)

        blocks, scales = kernels.in_row_slices(weight, pack_rows)
        return {"blocks": blocks, "scales": scales}

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(packed.layout.shape, dtype=dtype, device=packed.data.device)
        views = packed.views()
        codes = views["blocks"].view(-1)
        scales = _half_scales(codes.device)[views["scales"].view(-1).to(torch.int32)]

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_e2m1_blocks(codes, scales, BLOCK, start, stop, chunk)

        return kernels.fill(out, decode, step=BLOCK)

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        return True

    def element_values(self, options: Mxfp4Options) -> tuple[float, ...]:
        return kernels.E2M1_VALUES

    def with_elements(self, packed: PackedWeight, codes: Tensor) -> Mapping[str, Tensor]:
        return {**packed.views(), "blocks": kernels.pack_nibbles(codes, high_first=False)}

    def export(self, packed: PackedWeight) -> dict[str, Tensor]:
        views = packed.views()
        return {"blocks": views["blocks"].unflatten(1, (-1, BLOCK // 2)), "scales": views["scales"]}

    def adopt(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: Mxfp4Options
    ) -> Mapping[str, Tensor]:
        expected = (shape[0], shape[1] // BLOCK, BLOCK // 2)
        blocks = tensors.get("blocks")
        if blocks is None or blocks.shape != expected or "scales" not in tensors:
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise QuantizationError(f"expected MXFP4 blocks {expected} and scales {expected[:2]}, found {found}")
        if (tensors["scales"] == NOT_A_SCALE).any():
            raise QuantizationError("holds a scale that is not a number; the checkpoint is damaged")
        return {"blocks": blocks.flatten(1), "scales": tensors["scales"]}

    def checkpoint_names(self, parameter: str) -> Mapping[str, str]:
        return {"blocks": f"{parameter}_blocks", "scales": f"{parameter}_scales"}

    def reader(self, options: Mxfp4Options, activation_dtype: str | None = None) -> Mxfp4Reader:
        return Mxfp4Reader(backend=self, options=options)

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]], options: Mxfp4Options) -> Mapping[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in ("blocks", "scales")}


@lru_cache
def _half_scales(device: torch.device) -> Tensor:
    """Half of every E8M0 scale, by code."""
    codes = torch.arange(NOT_A_SCALE + 1)
    scales = torch.ldexp(torch.ones(len(codes)), codes - BIAS - 1)
    return torch.where(codes == NOT_A_SCALE, torch.nan, scales).to(device)
