"""Packing and dequantizing in bitsandbytes' formats, bit for bit as bitsandbytes does it.

nf4, fp4   two codes a byte, the even element in the high nibble; one fp32 scale (absmax) per block of the flattened
           weight. With double quantization the scales, less their mean, are themselves stored in 8 bit with one fp32
           scale per 256 (QLoRA, arXiv:2305.14314; bitsandbytes.functional.quantize_4bit).
int8       one byte a weight and one fp32 absmax per row: w = q * absmax / 127
           (bitsandbytes.functional.int8_vectorwise_quant).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn import functional

from quantune.backends import kernels
from quantune.backends.backend import Backend
from quantune.backends.bnb import BnbOptions
from quantune.backends.bnb.reader import BnbReader
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.backends.readers import dtype_name
from quantune.errors import QuantizationError

NESTED_BLOCK_SIZE = 256
"""Scales that share one scale under double quantization; fixed in bitsandbytes."""
INT8_STEP = 1 / 127
SMALLEST_ABSMAX = 2.0**-120
SMALLEST_SCALE = 1e-38
"""What bitsandbytes divides by at least."""
PACKED_AT_ONCE = 1 << 18
"""Elements of nf4 packed at a time: 1 MiB of fp32 stays in a core's cache."""
ZERO_NF4 = 0x77
"""Two codes of nf4's zero."""
ROW_FORMAT = 0
"""What checkpoints call int8 codes that lie in the order of the weight."""
STATE = "quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")
"""The tensors that a checkpoint may hold beside the codes of a 4-bit weight."""


class BnbBackend(Backend):
    """bitsandbytes' weight formats."""

    name = "bnb"

    def inner_tensors(self, shape: tuple[int, int], options: BnbOptions) -> Mapping[str, TensorSpec]:
        options = options.resolved()
        if options.weight_dtype == "int8":
            return {"codes": TensorSpec(torch.int8, shape), "absmax": TensorSpec(torch.float32, (shape[0],))}
        assert options.block_size is not None
        count = math.prod(shape)
        blocks = -(-count // options.block_size)
        codes = TensorSpec(torch.uint8, (-(-count // 2),))
        if not options.double_quant:
            return {"codes": codes, "absmax": TensorSpec(torch.float32, (blocks,))}
        return {
            "codes": codes,
            "absmax": TensorSpec(torch.uint8, (blocks,)),
            "nested_absmax": TensorSpec(torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            "nested_offset": TensorSpec(torch.float32, (1,)),
        }

    def pack(self, weight: Tensor, options: BnbOptions) -> Mapping[str, Tensor]:
        options = options.resolved()
        if options.weight_dtype == "int8":
            return _pack_int8(weight)
        assert options.block_size is not None
        pack_4bit = _pack_nf4 if options.weight_dtype == "nf4" and weight.device.type == "cpu" else _pack_4bit
        codes, absmax = pack_4bit(weight.flatten(), options.block_size, options.weight_dtype)
        if options.weight_dtype == "nf4" and weight.is_cuda:
            _write_zeros(codes, weight, options.block_size)
        if not options.double_quant:
            return {"codes": codes, "absmax": absmax}
        offset = absmax.mean()
        nested, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        return {
            "codes": codes,
            "absmax": nested,
            "nested_absmax": state.absmax,
            "nested_offset": offset.reshape(1),
        }

    def element_values(self, options: BnbOptions) -> tuple[float, ...]:
        options = options.resolved()
        if options.weight_dtype == "int8":
            return kernels.int8_values()
        return tuple(bnb.get_4bit_type(options.weight_dtype, device="cpu").tolist())

    def with_elements(self, packed: PackedWeight, codes: Tensor) -> Mapping[str, Tensor]:
        options: BnbOptions = packed.layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        if options.resolved().weight_dtype == "int8":
            return {**packed.views(), "codes": codes.view(torch.int8)}
        flat = functional.pad(codes.flatten(), (0, codes.numel() % 2))
        return {**packed.views(), "codes": kernels.pack_nibbles(flat, high_first=True)}

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        options: BnbOptions = layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        return options.weight_dtype == "int8"

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        options: BnbOptions = packed.layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        options = options.resolved()
        views = packed.views()
        if options.weight_dtype == "int8":
            return _dequantize_int8(views["codes"], views["absmax"], dtype, out)
        assert options.block_size is not None
        absmax = views["absmax"]
        if options.double_quant:
            absmax = bnb.dequantize_blockwise(
                absmax,
                absmax=views["nested_absmax"],
                code=_dynamic_map(absmax.device),
                blocksize=NESTED_BLOCK_SIZE,
            )
            absmax += views["nested_offset"]
        # flat: given rows, its AVX512 kernel begins a block with each, though blocks run on from row to row
        flat = (math.prod(packed.layout.shape),)
        return torch.ops.bitsandbytes.dequantize_4bit(
            views["codes"], absmax, options.block_size, options.weight_dtype, flat, dtype
        ).view(packed.layout.shape)

    def export(self, packed: PackedWeight) -> dict[str, Tensor]:
        """As bitsandbytes' `Linear4bit` and `Linear8bitLt` save a weight."""
        options: BnbOptions = packed.layout.options  # type: ignore[assignment]  # the layout is backend-agnostic
        options = options.resolved()
        views = packed.views()
        if options.weight_dtype == "int8":
            row_format = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
            return {"weight": views["codes"], "SCB": views["absmax"], "weight_format": row_format}
        state: dict[str, Any] = {
            "quant_type": options.weight_dtype,
            "blocksize": options.block_size,
            "dtype": dtype_name(packed.layout.dtype),
            "shape": list(packed.layout.shape),
        }
        exported = {
            "weight": views["codes"][:, None],
            "absmax": views["absmax"],
            "quant_map": bnb.get_4bit_type(options.weight_dtype, device=packed.data.device),
        }
        if options.double_quant:
            exported["nested_absmax"] = views["nested_absmax"]
            exported["nested_quant_map"] = _dynamic_map(packed.data.device)
            state["nested_blocksize"] = NESTED_BLOCK_SIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = views["nested_offset"].item()
        text = json.dumps(state).encode()
        exported[f"{STATE}{options.weight_dtype}"] = torch.tensor(list(text), dtype=torch.uint8)
        return exported

    def adopt(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: BnbOptions) -> Mapping[str, Tensor]:
        options = options.resolved()
        expected = {name for name, _ in _stored(options)}
        if tensors.keys() != expected:
            raise QuantizationError(f"expected the tensors {sorted(expected)}, found {sorted(tensors)}")
        for name, constant in _stored(options):
            tensor = tensors[name]
            if constant is not None and not _same(tensor.cpu(), constant):
                raise QuantizationError(f"expected {name} as bitsandbytes has it, found other values")
        if options.weight_dtype == "int8":
            return {"codes": tensors["weight"], "absmax": tensors["SCB"]}
        state = _read_state(tensors[f"{STATE}{options.weight_dtype}"])
        found = {key: state.get(key) for key in ("blocksize", "shape")}
        if found != {"blocksize": options.block_size, "shape": list(shape)}:
            raise QuantizationError(
                f"expected blocks of {options.block_size} and the shape {list(shape)}, found {found}"
            )
        inner = {"codes": tensors["weight"].reshape(-1), "absmax": tensors["absmax"]}
        if options.double_quant:
            offset = state.get("nested_offset")
            if not isinstance(offset, float) or state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
                raise QuantizationError(
                    f"expected scales in blocks of {NESTED_BLOCK_SIZE} and their mean, found {state}"
                )
            inner["nested_absmax"] = tensors["nested_absmax"]
            inner["nested_offset"] = torch.tensor([offset], device=inner["codes"].device)
        return inner

    def checkpoint_names(self, parameter: str) -> Mapping[str, str]:
        module = parameter.removesuffix("weight")
        names = {part: f"{parameter}.{part}" for part in FOUR_BIT_PARTS}
        return {"weight": parameter, **names, "SCB": f"{module}SCB", "weight_format": f"{module}weight_format"}

    def stored_names(self, parameter: str, options: BnbOptions) -> Mapping[str, str]:
        names = self.checkpoint_names(parameter)
        return {part: names[part] for part, _ in _stored(options.resolved())}

    def reader(self, options: BnbOptions, activation_dtype: str | None = None) -> BnbReader:
        return BnbReader(backend=self, options=options.resolved())


def _stored(options: BnbOptions) -> list[tuple[str, Tensor | None]]:
    """The tensors that a checkpoint stores for a weight, with their values where they are constants of the format."""
    if options.weight_dtype == "int8":
        return [("weight", None), ("SCB", None), ("weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8))]
    code_book = bnb.get_4bit_type(options.weight_dtype, device="cpu")
    stored = [("weight", None), ("absmax", None), ("quant_map", code_book), (f"{STATE}{options.weight_dtype}", None)]
    if options.double_quant:
        stored += [("nested_absmax", None), ("nested_quant_map", _dynamic_map(torch.device("cpu")))]
    return stored


def _read_state(state: Tensor) -> dict[str, Any]:
    """What a 4-bit weight's checkpoint says of it beside tensors, JSON as bytes."""
    try:
        document = json.loads(bytes(state.tolist())) if state.dtype == torch.uint8 else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise QuantizationError("expected bitsandbytes' quant_state as JSON in uint8, found something else")
    return document


def _same(tensor: Tensor, constant: Tensor) -> bool:
    """Whether a stored code book is bitsandbytes': it computes them, with other last bits on other processors."""
    alike = tensor.dtype == constant.dtype and tensor.shape == constant.shape
    return alike and torch.allclose(tensor.double(), constant.double(), rtol=0, atol=1e-6)


def _pack_4bit(weight: Tensor, block_size: int, weight_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and scales in fp32 of a flat weight, by bitsandbytes."""
    codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=weight_dtype)
    return codes.reshape(-1), state.absmax


def _pack_nf4(weight: Tensor, block_size: int, weight_dtype: str) -> tuple[Tensor, Tensor]:
    """The same, three times as fast as bitsandbytes on a CPU: a code is the number of boundaries below a value, and
    counting them chunk by chunk beats its binary search."""
    bounds = _nf4_bounds()
    whole = weight.numel() // block_size * block_size
    parts = []
    for chunk in weight[:whole].split(PACKED_AT_ONCE):
        blocks = chunk.float().view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).view(-1)
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for bound in bounds:
            codes += scaled > bound
        parts.append((kernels.pack_nibbles(codes, high_first=True), absmax))
    if whole < weight.numel():
        parts.append(_pack_4bit(weight[whole:], block_size, weight_dtype))
    return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])


@lru_cache
def _nf4_bounds() -> tuple[float, ...]:
    """The largest value of each code but the last, as bitsandbytes computes them: halfway to the next, in fp32."""
    values = bnb.get_4bit_type("nf4", device="cpu")
    return tuple(((values[:-1] + values[1:]) / 2).tolist())


def _write_zeros(codes: Tensor, weight: Tensor, block_size: int) -> None:
    """Give blocks of zeros the code of zero, as packing on the CPU does; `codes` has shape (bytes,), uint8.

    CUDA's kernel divides by the block's scale, 0, and writes the code of -1. Double quantization brings that scale back
    only nearly, and the zeros would be small negative numbers.
    """
    rest = -weight.numel() % block_size
    blocks = torch.nn.functional.pad(weight.flatten(), (0, rest)).view(-1, block_size)
    zero = (blocks == 0).all(dim=1)
    codes.masked_fill_(zero.repeat_interleave(block_size // 2)[: codes.numel()], ZERO_NF4)


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    absmax = weight.abs().amax(dim=1).float()
    # a row of zeros has no scale: its codes are zeros; below SMALLEST_ABSMAX 127 / absmax would overflow
    scale = torch.where(absmax > 0, 127.0 / absmax.clamp_min(SMALLEST_ABSMAX), 0.0)
    return {"codes": torch.round(weight * scale[:, None]).to(torch.int8), "absmax": absmax}


def _dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    in_features = codes.shape[1]
    flat = codes.view(-1)

    def decode(start: int, stop: int, chunk: Tensor) -> None:
        chunk.copy_(flat[start:stop])
        kernels.scale_blocks_(chunk, absmax[start // in_features :], in_features)
        chunk.mul_(INT8_STEP)  # two roundings, as there

    return kernels.fill(torch.empty_like(codes, dtype=dtype) if out is None else out, decode, step=in_features)


@lru_cache
def _dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit code book for scales, shape (256,), fp32: a constant of the format."""
    return bnb.create_dynamic_map().to(device)
