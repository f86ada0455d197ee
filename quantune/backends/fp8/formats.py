"""Packing and dequantizing fp8 in blocks, as DeepSeek's checkpoints hold it.

float8_e4m3fn codes of the weight's shape and one fp32 factor per block, called `weight_scale_inv` in checkpoints and
MULTIPLIED: w = code * scale_inv (DeepSeek-V3, inference/kernel.py; packing as transformers' `Fp8Quantize`). Blocks at
the edges are cut off: 576 rows have 5 rows of factors, the last one for 64 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.fp8 import Fp8Options
from quantune.backends.fp8.reader import Fp8Reader
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.errors import QuantizationError

SMALLEST_ABSMAX = 2.0**-119
"""Below it 448 / absmax overflows."""
NOT_A_NUMBER = 0x7F
"""The code of NaN, its sign left out."""


class Fp8Backend(Backend):
    """e4m3 in blocks."""

    name = "fp8"

    def inner_tensors(self, shape: tuple[int, int], options: Fp8Options) -> Mapping[str, TensorSpec]:
        return {
            "weight": TensorSpec(torch.float8_e4m3fn, shape),
            "weight_scale_inv": TensorSpec(torch.float32, _grid(shape, options)),
        }

    def pack(self, weight: Tensor, options: Fp8Options) -> Mapping[str, Tensor]:
        block_rows = min(options.block_size[0], weight.shape[0])  # a block larger than the weight is the weight
        block_columns = min(options.block_size[1], weight.shape[1])

        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            grid_rows = kernels.blocks_of(rows.shape[0], block_rows)
            grid_columns = kernels.blocks_of(rows.shape[1], block_columns)
            missing = (0, grid_columns * block_columns - rows.shape[1], 0, grid_rows * block_rows - rows.shape[0])
            padded = functional.pad(rows.float(), missing)
            blocks = padded.view(grid_rows, block_rows, grid_columns, block_columns)
            absmax = blocks.abs().amax(dim=(1, 3))
            scale = torch.where(absmax > 0, kernels.E4M3_MAX / absmax.clamp_min(SMALLEST_ABSMAX), 1.0)
            codes = kernels.encode_e4m3(blocks * scale[:, None, :, None]).view(padded.shape)
            return codes[: rows.shape[0], : rows.shape[1]], 1.0 / scale

        codes, scale_inv = kernels.in_row_slices(weight, pack_rows, rows=block_rows)
        return {"weight": codes, "weight_scale_inv": scale_inv}

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        options: Fp8Options = packed.layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        if out is None:
            out = torch.empty(packed.layout.shape, dtype=dtype, device=packed.data.device)
        views = packed.views()
        block_rows, block_columns = options.block_size
        in_features = packed.layout.shape[1]
        codes = views["weight"].view(-1)
        scales = (views["weight_scale_inv"] * kernels.E4M3_UNIT).repeat_interleave(block_rows, dim=0)
        whole = in_features // block_columns

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_e4m3(codes[start:stop], chunk)
            rows = chunk.view(-1, in_features)
            scale = scales[start // in_features : stop // in_features]
            rows[:, : whole * block_columns].unflatten(1, (whole, block_columns)).mul_(scale[:, :whole, None])
            rows[:, whole * block_columns :].mul_(scale[:, whole:])

        return kernels.fill(out, decode, step=in_features)

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        return True

    def element_values(self, options: Fp8Options) -> tuple[float, ...]:
        return kernels.e4m3_values()

    def with_elements(self, packed: PackedWeight, codes: Tensor) -> Mapping[str, Tensor]:
        return {**packed.views(), "weight": codes.view(torch.float8_e4m3fn)}

    def adopt(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: Fp8Options) -> Mapping[str, Tensor]:
        grid = _grid(shape, options)
        if tensors.keys() != {"weight", "weight_scale_inv"}:
            raise QuantizationError(f"expected the tensors weight and weight_scale_inv, found {sorted(tensors)}")
        scale_inv = tensors["weight_scale_inv"]
        if scale_inv.shape != grid:
            raise QuantizationError(
                f"expected {grid} scales for {shape} weights in blocks of {options.block_size}, "
                f"found {tuple(scale_inv.shape)}"
            )
        if not scale_inv.is_floating_point():
            raise QuantizationError(f"expected weight_scale_inv in a floating-point dtype, found {scale_inv.dtype}")
        codes = tensors["weight"]
        if codes.dtype == torch.float8_e4m3fn and ((codes.view(torch.uint8) & NOT_A_NUMBER) == NOT_A_NUMBER).any():
            raise QuantizationError("holds codes that are not numbers; the checkpoint is damaged")
        if not torch.isfinite(scale_inv.float()).all():
            raise QuantizationError("holds scales that are not numbers; the checkpoint is damaged")
        return {"weight": codes, "weight_scale_inv": scale_inv.float()}  # bf16 and ue8m0 scales are exact in fp32

    def checkpoint_names(self, parameter: str) -> Mapping[str, str]:
        return {"weight": parameter, "weight_scale_inv": f"{parameter}_scale_inv"}

    def reader(self, options: Fp8Options, activation_dtype: str | None = None) -> Fp8Reader:
        return Fp8Reader(backend=self, options=options)

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]], options: Fp8Options) -> Mapping[str, Tensor]:
        block_rows = options.block_size[0]
        rows = [part["weight"].shape[0] for part in parts]
        if any(count % block_rows for count in rows[:-1]):
            raise QuantizationError(
                f"its parts of {' and '.join(map(str, rows))} rows don't fill blocks of {block_rows}, so stacked, the "
                "blocks would shift. Choose the unquantized base"
            )
        codes = torch.cat([part["weight"].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": torch.cat([part["weight_scale_inv"].float() for part in parts])}


def _grid(shape: tuple[int, int], options: Fp8Options) -> tuple[int, int]:
    """Blocks along rows and columns."""
    rows, columns = shape
    return kernels.blocks_of(rows, options.block_size[0]), kernels.blocks_of(columns, options.block_size[1])
