"""Packing and dequantizing in torchao's weight formats, bit for bit as torchao does it, on any device.

int4    two's-complement nibbles, the even element in the low one; a bf16 scale and zero per group of a row,
        w = q * scale + zero, stored transposed (groups, out features), as torchao's `Int4Tensor` holds them. torchao
        itself packs and computes with it on CUDA only. Scale and zero are rounded to bf16 before the codes are chosen,
        which lowers the error.
nf4     two codes a byte, the even element in the high nibble; a scale per block of the flattened weight, itself stored
        as int8 less the mean of all scales, with a factor per `scaler_block_size` (torchao's `NF4Tensor`). Computed in
        the dtype of the weight, as there.
nvfp4   E2M1, the even element in the low nibble; an e4m3 scale per 16 of a row and one fp32 scale for all
        (torchao.prototype.mx_formats.nvfp4_tensor).
int8    one byte a weight and an fp32 scale per row or group, symmetric, w = q * scale (torchao's `Int8Tensor`).
fp8     e4m3 with an fp32 scale per row (torchao's `Float8Tensor`).

Where torchao's arithmetic breaks down (blocks and rows of zeros become NaN or nearly zero, subnormal weights become
NaN) the weights are stored as what they are nearest to, zeros as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.backends.torchao import INT4_GROUP_SIZES, TorchaoOptions
from quantune.backends.torchao.reader import (
    PARTS,
    STORED,
    TorchaoReader,
    stored_name,
    swizzled,
    swizzled_shape,
    unswizzled,
)
from quantune.errors import QuantizationError

Views = Mapping[str, Tensor]
Shape = tuple[int, int]

NF4_VALUES = (
    *(-1.0000, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0000),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0000),
)
"""torchao's table, rounded to 4 digits; bitsandbytes' has more, so the codes are not interchangeable."""
NF4_ZERO = NF4_VALUES.index(0.0)


class Format(Protocol):
    """One of torchao's formats; the arguments are those of `Backend`, the options resolved."""

    @property
    def values(self) -> tuple[float, ...]:
        """Of each element code."""

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]: ...

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]: ...

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor: ...

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        """The inner tensor that holds element codes, uint8 (out features, in features)."""


class TorchaoBackend(Backend):
    """torchao's weight formats."""

    name = "torchao"

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> Mapping[str, TensorSpec]:
        return FORMATS[options.weight_dtype].inner_tensors(shape, options.resolved())

    def pack(self, weight: Tensor, options: TorchaoOptions) -> Mapping[str, Tensor]:
        return FORMATS[options.weight_dtype].pack(weight, options.resolved())

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        layout = packed.layout
        options: TorchaoOptions = layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        if out is None:
            out = torch.empty(layout.shape, dtype=dtype, device=packed.data.device)
        return FORMATS[options.weight_dtype].dequantize(packed.views(), layout, options.resolved(), out)

    def element_values(self, options: TorchaoOptions) -> tuple[float, ...]:
        return FORMATS[options.weight_dtype].values

    def with_elements(self, packed: PackedWeight, codes: Tensor) -> Mapping[str, Tensor]:
        options: TorchaoOptions = packed.layout.options  # type: ignore[assignment]  # as above
        return {**packed.views(), **FORMATS[options.weight_dtype].elements(codes)}

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        return True

    def export(self, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors as torchao's own tensor classes hold them; those of nf4, which it can't save, as they are."""
        options: TorchaoOptions = packed.layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        views = packed.views()
        if options.weight_dtype == "int8":
            return {**views, "zero_point": torch.zeros_like(views["scale"], dtype=torch.int8)}
        if options.weight_dtype == "nvfp4":
            scale, tensor_scale = swizzled(views["scale"]), views["per_tensor_scale"].view(())
            return {"qdata": views["qdata"], "scale": scale, "per_tensor_scale": tensor_scale}
        return views

    def adopt(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: TorchaoOptions
    ) -> Mapping[str, Tensor]:
        if options.weight_dtype == "int8":
            zeros = tensors.get("zero_point")
            if zeros is None or zeros.dtype != torch.int8 or zeros.shape != _shape(tensors, "scale") or zeros.any():
                raise QuantizationError(
                    "expected a zero_point of zeros for every scale (symmetric int8), found another"
                )
            return {name: tensor for name, tensor in tensors.items() if name != "zero_point"}
        if options.weight_dtype == "nvfp4":
            if tensors.keys() != {"qdata", "scale", "per_tensor_scale"}:
                raise QuantizationError(f"expected qdata, scale and per_tensor_scale, found {sorted(tensors)}")
            ordered = (shape[0], shape[1] // Nvfp4.GROUP_SIZE)
            expected = swizzled_shape(ordered)
            found = tuple(tensors["scale"].shape)
            if found != expected or tensors["per_tensor_scale"].shape != ():
                raise QuantizationError(f"expected scales of {expected} and one for all of them, found {found}")
            scale = unswizzled(tensors["scale"], ordered)
            return {**tensors, "scale": scale, "per_tensor_scale": tensors["per_tensor_scale"].view(1)}
        return tensors

    def checkpoint_names(self, parameter: str) -> Mapping[str, str]:
        return {part: stored_name(parameter, part) for part in PARTS}

    def stored_names(self, parameter: str, options: TorchaoOptions) -> Mapping[str, str]:
        return {part: stored_name(parameter, part) for part in STORED.get(options.weight_dtype, ())}

    def reader(self, options: TorchaoOptions, activation_dtype: str | None = None) -> TorchaoReader:
        if options.weight_dtype == "nf4":
            raise QuantizationError(
                "torchao can't save its nf4, so no library reads it; bitsandbytes' nf4 is read by transformers "
                '(backend = "bnb")'
            )
        if activation_dtype is not None and activation_dtype not in options.activation_dtypes():
            raise QuantizationError(
                f"torchao does not multiply {options.weight_dtype} weights by {activation_dtype} activations: it takes "
                "int8 by int8 and fp8 by fp8, with one scale for each row (no group_size)"
            )
        return TorchaoReader(backend=self, options=options.resolved(), activation_dtype=activation_dtype)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


class Int4:
    """Asymmetric 4-bit integers in groups."""

    values = (*range(8), *range(-8, 0))

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]:
        out_features, in_features = shape
        assert options.group_size is not None
        kernels.require_groups(in_features, options.group_size, "group_size", INT4_GROUP_SIZES)
        groups = in_features // options.group_size
        return {
            "qdata": TensorSpec(torch.int8, (out_features, in_features // 2)),
            "scale": TensorSpec(torch.bfloat16, (groups, out_features)),
            "zero_point": TensorSpec(torch.bfloat16, (groups, out_features)),
        }

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]:
        assert options.group_size is not None
        group_size = options.group_size

        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            groups = rows.float().unflatten(1, (-1, group_size))
            low, high = groups.amin(dim=2), groups.amax(dim=2)
            scale = ((high - low) / 15).bfloat16()
            zero = (low + 8 * scale.float()).bfloat16()
            divisor = torch.where(scale == 0, 1.0, scale.float())  # a group of equal weights is its zero
            codes = ((groups - zero.float()[:, :, None]) / divisor[:, :, None]).round_().clamp_(-8, 7)
            nibbles = codes.to(torch.int8).view(torch.uint8).bitwise_and_(15).flatten(1)
            return kernels.pack_nibbles(nibbles, high_first=False).view(torch.int8), scale, zero

        qdata, scale, zero = kernels.in_row_slices(weight, pack_rows)
        if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
            raise QuantizationError(_TOO_LARGE)
        return {"qdata": qdata, "scale": scale.T.contiguous(), "zero_point": zero.T.contiguous()}

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        return {"qdata": kernels.pack_nibbles(codes, high_first=False).view(torch.int8)}

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor:
        assert options.group_size is not None
        size = options.group_size
        codes = views["qdata"].view(-1)
        scale, zero = (views[name].float().T.reshape(-1) for name in ("scale", "zero_point"))

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_int4(codes, start, stop, chunk)
            groups = chunk.view(-1, size)
            groups.mul_(scale[start // size : stop // size, None]).add_(zero[start // size : stop // size, None])

        return kernels.fill(out, decode, step=size)


class Nf4:
    """4-bit NormalFloat with double quantization."""

    values = NF4_VALUES

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]:
        assert options.group_size is not None and options.scaler_block_size is not None
        count = math.prod(shape)
        blocks = kernels.blocks_of(count, options.group_size)
        scaler_blocks = kernels.blocks_of(blocks, options.scaler_block_size)
        return {
            "quantized_data": TensorSpec(torch.uint8, (kernels.blocks_of(count, 2),)),
            "quantized_scalers": TensorSpec(torch.int8, (blocks,)),
            "quantization_factor": TensorSpec(torch.float32, (scaler_blocks,)),
            "scaler_mean": TensorSpec(torch.float32, (1,)),
        }

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]:
        assert options.group_size is not None and options.scaler_block_size is not None
        scalers = kernels.block_absmax(weight, options.group_size)
        codes = self._codes(weight, scalers, options.group_size)
        mean = scalers.mean()
        centered = scalers - mean
        together = min(options.scaler_block_size, scalers.numel())
        absmax = kernels.block_absmax(centered, together)
        factor = 256 / (2 * absmax)
        if not (torch.isfinite(mean) and (factor != 0).all()):
            raise QuantizationError(_TOO_LARGE)
        overflown = torch.isinf(factor) & (absmax > 0)  # fp16 does so below 0.002
        factor = torch.where(overflown, 256 / (2 * absmax.float()), factor.float())
        # rounded to the weight's dtype, as its product with the factor is there
        quantized = (kernels.pad_blocks(centered, together) * factor[:, None]).to(weight.dtype)
        quantized = torch.where(absmax[:, None] > 0, quantized, 0.0)  # equal scales: 0 * inf
        return {
            "quantized_data": codes,
            "quantized_scalers": quantized.round().clamp(-128, 127).to(torch.int8).view(-1)[: scalers.numel()],
            "quantization_factor": factor,
            "scaler_mean": mean.float().reshape(1),
        }

    def _codes(self, weight: Tensor, scalers: Tensor, size: int) -> Tensor:
        thresholds = _nf4_thresholds(weight.dtype, weight.device)
        blocks = kernels.pad_blocks(weight, size)
        parts = []
        for rows, scales in zip(
            blocks.split(kernels.PACKED_AT_ONCE // size), scalers.split(kernels.PACKED_AT_ONCE // size), strict=True
        ):
            codes = torch.bucketize(rows / scales[:, None], thresholds, out_int32=True).to(torch.uint8)
            codes[scales == 0] = NF4_ZERO
            parts.append(kernels.pack_nibbles(codes.view(-1), high_first=True))
        return torch.cat(parts)[: kernels.blocks_of(weight.numel(), 2)]

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        flat = functional.pad(codes.flatten(), (0, codes.numel() % 2))
        return {"quantized_data": kernels.pack_nibbles(flat, high_first=True)}

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor:
        assert options.group_size is not None and options.scaler_block_size is not None
        size, dtype = options.group_size, layout.dtype
        factor, mean = views["quantization_factor"], views["scaler_mean"].to(dtype)
        together = min(options.scaler_block_size, views["quantized_scalers"].numel())
        blocks = kernels.pad_blocks(views["quantized_scalers"], together)
        scalers = ((blocks / factor[:, None]).to(dtype) + mean).view(-1).float()
        values = tuple(torch.tensor(NF4_VALUES, dtype=dtype).tolist())
        table = kernels.pair_table(values, out.device)

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_pairs(views["quantized_data"], table, start, stop, chunk)
            kernels.scale_blocks_(chunk, scalers[start // size :], size)

        return kernels.fill(out, decode, step=size, rounded_to=dtype)


@lru_cache
def _nf4_thresholds(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The largest value whose nearest code is i, for i from 0 to 14, as torchao decides it: by the smallest difference
    computed in `dtype`, the lower code on a tie. Found among the numbers around each midpoint."""
    table = torch.tensor(NF4_VALUES, dtype=dtype)
    middles = ((table[1:].double() + table[:-1].double()) / 2).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    around = (middles.view(integers)[:, None] + torch.arange(-48, 49, dtype=integers)).view(dtype)
    codes = (around[:, :, None] - table).abs().min(dim=2).indices
    below = codes <= torch.arange(15)[:, None]
    infinite = torch.tensor(-math.inf, dtype=dtype)
    return torch.where(below, around, infinite).amax(dim=1).to(device)


class Nvfp4:
    """NVIDIA's 4-bit float: E2M1, an e4m3 scale per 16, one fp32 scale for all."""

    values = kernels.E2M1_VALUES

    GROUP_SIZE = 16
    SMALLEST_SCALE = 2.0**-6
    """The smallest normal e4m3 number: block scales are not below it."""
    SMALLEST_TENSOR_SCALE = 2.0**-112
    """Below it the reciprocal or the products of the scales leave fp32's normal range."""

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]:
        out_features, in_features = shape
        if in_features % self.GROUP_SIZE:
            raise QuantizationError(f"nvfp4 stores rows in groups of 16, which do not divide its {in_features}")
        return {
            "qdata": TensorSpec(torch.uint8, (out_features, in_features // 2)),
            "scale": TensorSpec(torch.float8_e4m3fn, (out_features, in_features // self.GROUP_SIZE)),
            "per_tensor_scale": TensorSpec(torch.float32, (1,)),
        }

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]:
        absmax = weight.abs().amax().float()
        tensor_scale = (absmax / (kernels.E4M3_MAX * kernels.E2M1_MAX)).clamp_min(self.SMALLEST_TENSOR_SCALE)

        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            groups = rows.float().unflatten(1, (-1, self.GROUP_SIZE))
            ideal = groups.abs().amax(dim=2) / kernels.E2M1_MAX / tensor_scale
            scale = ideal.clamp(self.SMALLEST_SCALE, kernels.E4M3_MAX).to(torch.float8_e4m3fn)
            reciprocal = (1.0 / tensor_scale) / scale.float()
            codes = kernels.encode_e2m1((groups * reciprocal[:, :, None]).flatten(1))
            return kernels.pack_nibbles(codes, high_first=False), scale

        qdata, scale = kernels.in_row_slices(weight, pack_rows)
        return {"qdata": qdata, "scale": scale, "per_tensor_scale": tensor_scale.reshape(1)}

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        return {"qdata": kernels.pack_nibbles(codes, high_first=False)}

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor:
        codes = views["qdata"].view(-1)
        scales = e4m3_values(views["scale"]).mul_(views["per_tensor_scale"]).mul_(0.5).view(-1)

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_e2m1_blocks(codes, scales, self.GROUP_SIZE, start, stop, chunk)

        return kernels.fill(out, decode, step=self.GROUP_SIZE)


def e4m3_values(codes: Tensor) -> Tensor:
    """float8_e4m3fn codes as fp32, by table: few enough that looking up beats casting."""
    return _e4m3_table(codes.device)[codes.view(torch.uint8).to(torch.int32)]


@lru_cache
def _e4m3_table(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


class Int8:
    """Symmetric 8-bit integers by rows or groups."""

    values = kernels.int8_values()

    SMALLEST_SCALE = torch.finfo(torch.float32).eps

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]:
        out_features, in_features = shape
        size = options.group_size or in_features
        kernels.require_groups(in_features, size, "group_size", INT4_GROUP_SIZES)
        return {
            "qdata": TensorSpec(torch.int8, shape),
            "scale": TensorSpec(torch.float32, (out_features, in_features // size)),
        }

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]:
        size = options.group_size or weight.shape[1]

        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            groups = rows.unflatten(1, (-1, size))
            scale = (groups.abs().amax(dim=2) / 127.5).clamp_min(self.SMALLEST_SCALE).float()
            codes = (groups * (1.0 / scale)[:, :, None]).round_().clamp_(-128, 127)
            return codes.to(torch.int8).flatten(1), scale

        qdata, scale = kernels.in_row_slices(weight, pack_rows)
        return {"qdata": qdata, "scale": scale}

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        return {"qdata": codes.view(torch.int8)}

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor:
        size = options.group_size or layout.shape[1]
        codes, scales = views["qdata"].view(-1), views["scale"].view(-1)

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            chunk.copy_(codes[start:stop])
            kernels.scale_blocks_(chunk, scales[start // size :], size)

        return kernels.fill(out, decode, step=size)


class Fp8:
    """e4m3 with one scale per row."""

    values = kernels.e4m3_values()

    def inner_tensors(self, shape: Shape, options: TorchaoOptions) -> dict[str, TensorSpec]:
        return {
            "qdata": TensorSpec(torch.float8_e4m3fn, shape),
            "scale": TensorSpec(torch.float32, (shape[0], 1)),
        }

    def pack(self, weight: Tensor, options: TorchaoOptions) -> dict[str, Tensor]:
        def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            scale = (rows.abs().amax(dim=1, keepdim=True) / kernels.E4M3_MAX).float()
            divisor = torch.where(scale == 0, 1.0, scale)
            return kernels.encode_e4m3(rows.float() / divisor), scale

        qdata, scale = kernels.in_row_slices(weight, pack_rows)
        return {"qdata": qdata, "scale": scale}

    def elements(self, codes: Tensor) -> dict[str, Tensor]:
        return {"qdata": codes.view(torch.float8_e4m3fn)}

    def dequantize(self, views: Views, layout: PackedLayout, options: TorchaoOptions, out: Tensor) -> Tensor:
        in_features = layout.shape[1]
        codes, scales = views["qdata"].view(-1), views["scale"].view(-1) * kernels.E4M3_UNIT

        def decode(start: int, stop: int, chunk: Tensor) -> None:
            kernels.decode_e4m3(codes[start:stop], chunk)
            kernels.scale_blocks_(chunk, scales[start // in_features :], in_features)

        return kernels.fill(out, decode, step=in_features)


FORMATS: dict[str, Format] = {"int4": Int4(), "nf4": Nf4(), "nvfp4": Nvfp4(), "int8": Int8(), "fp8": Fp8()}
_TOO_LARGE = "its values are too large: their scales leave the range of floating-point numbers"
