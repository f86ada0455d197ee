"""transformers' reader of torchao's safetensors.

A weight called `model.norm_in.weight` is stored as `model.norm_in._weight_qdata`, `..._weight_scale` and so on, and the
header of every file says for each weight of the checkpoint which of torchao's tensors it is and with what attributes
(torchao.prototype.safetensors). Written here without torchao, as it writes them itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from quantune.backends import kernels
from quantune.backends.layout import PackedLayout
from quantune.backends.readers import Destination, Reader, dtype_name
from quantune.backends.torchao import TorchaoOptions

PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
STORED = {
    "int8": ("zero_point", "qdata", "scale"),
    "fp8": ("qdata", "scale"),
    "int4": ("qdata", "scale", "zero_point"),
    "nvfp4": ("per_tensor_scale", "qdata", "scale"),
}
"""The tensors of a weight, in the order in which torchao names them."""
PARTS = ("qdata", "scale", "zero_point", "per_tensor_scale")
FP8_MULTIPLE = 16
"""What both dimensions are a multiple of where activations are fp8 as well; torchao leaves other weights alone."""


@attrs.frozen(kw_only=True)
class TorchaoReader(Reader):
    """Checkpoints as transformers' `TorchAoConfig` describes them."""

    library = "transformers with torchao"
    model_names = True

    options: TorchaoOptions
    activation_dtype: str | None = None
    """What activations are rounded to, with a scale per token; None to leave them as they are."""

    def quantization_config(self, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        name, version, data = _config(self.options, self.activation_dtype)
        return {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": name, "_version": version, "_data": data}},
            "modules_to_not_convert": list(kept),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    def refusal(self, destination: Destination) -> str | None:
        if destination.expert:
            return "quantune writes torchao's linear layers only, and this is one of fused experts"
        if self.activation_dtype != "fp8":
            return None
        if destination.dtype != torch.bfloat16:
            return f"torchao multiplies fp8 by fp8 in bf16 only, and the checkpoint is {dtype_name(destination.dtype)}"
        if any(size % FP8_MULTIPLE for size in destination.shape):
            return f"torchao multiplies fp8 by fp8 in multiples of {FP8_MULTIPLE} only, and its shape is " + " x ".join(
                map(str, destination.shape)
            )
        return None

    def metadata(self, layouts: Mapping[str, PackedLayout], others: Iterable[str]) -> dict[str, str]:
        header = {name: json.dumps({"_type": "Tensor"}) for name in others}
        header.update((name, json.dumps(self._tensor(layout))) for name, layout in layouts.items())
        header["tensor_names"] = json.dumps(list(header))
        return header

    def _tensor(self, layout: PackedLayout) -> dict[str, Any]:
        """What the header says of one weight."""
        rows, columns = layout.shape
        dtype = _enum("torch.dtype", dtype_name(layout.dtype))
        data: dict[str, Any]
        group = [1, self.options.group_size or columns]
        if self.options.weight_dtype == "int8":
            data = {
                "act_quant_kwargs": INT8_ACTIVATIONS if self.activation_dtype else None,
                "reduce_range": False,
                "block_size": group,
                "dtype": dtype,
            }
            return _described("Int8Tensor", data, STORED["int8"])
        if self.options.weight_dtype == "fp8":
            data = {
                "block_size": [1, columns],
                "mm_config": FP8_MATMUL if self.activation_dtype else None,
                "act_quant_kwargs": FP8_ACTIVATIONS if self.activation_dtype else None,
                "kernel_preference": _enum("KernelPreference", "AUTO"),
                "dtype": dtype,
            }
            return _described("Float8Tensor", data, STORED["fp8"])
        if self.options.weight_dtype == "int4":
            activation = _enum("torch.dtype", "bfloat16")
            data = {"activation_dtype": activation, "block_size": group, "shape": [rows, columns]}
            return _described("Int4Tensor", data, STORED["int4"])
        assert self.options.weight_dtype == "nvfp4"
        data = {
            "is_swizzled_scales": True,
            "use_triton_kernel": False,
            "act_quant_kwargs": None,
            "block_size": self.options.group_size,
            "orig_dtype": dtype,
        }
        return _described("NVFP4Tensor", data, STORED["nvfp4"])


def _config(options: TorchaoOptions, activation_dtype: str | None) -> tuple[str, int, dict[str, Any]]:
    """The class of torchao's that quantizes so, its version, and its arguments."""
    if options.weight_dtype == "int8":
        if activation_dtype is not None:
            return "Int8DynamicActivationInt8WeightConfig", 2, {}
        per_group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": options.group_size}}
        return "Int8WeightOnlyConfig", 2, {"granularity": per_group if options.group_size else PER_ROW}
    if options.weight_dtype == "fp8":
        if activation_dtype is not None:
            return "Float8DynamicActivationFloat8WeightConfig", 2, {"granularity": [PER_ROW, PER_ROW]}
        return "Float8WeightOnlyConfig", 2, {}
    if options.weight_dtype == "int4":
        return "Int4WeightOnlyConfig", 2, {"group_size": options.group_size}
    return "NVFP4WeightOnlyConfig", 1, {}


def _described(kind: str, data: dict[str, Any], tensors: Sequence[str]) -> dict[str, Any]:
    return {"_type": kind, "_data": data, "_tensor_data_names": list(tensors)}


def _enum(kind: str, name: str) -> dict[str, str]:
    return {"_type": kind, "_data": name}


def stored_name(name: str, part: str) -> str:
    """What checkpoints call one of the tensors of a weight."""
    module, dot, leaf = name.rpartition(".")
    return f"{module}{dot}_{leaf}_{part}"


PER_TOKEN = {"_type": "PerRow", "_data": {"dim": -1}}
INT8_ACTIVATIONS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"granularity": PER_TOKEN, "mapping_type": _enum("MappingType", "SYMMETRIC"), "reduce_range": False},
}
FP8_MATMUL = {
    "_type": "Float8MMConfig",
    "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
}
FP8_ACTIVATIONS = {
    "_type": "QuantizeTensorToFloat8Kwargs",
    "_data": {
        "float8_dtype": _enum("torch.dtype", "float8_e4m3fn"),
        "granularity": PER_TOKEN,
        "mm_config": None,
        "hp_value_lb": None,
        "hp_value_ub": None,
        "kernel_preference": _enum("KernelPreference", "AUTO"),
    },
}


def swizzled(scales: Tensor) -> Tensor:
    """Scales of blocks, shape (rows, columns), in the order that NVIDIA's matrix units read them in: tiles of 128 x 4,
    padded with zeros, the 4 rows 32 apart next to one another. Shape as `swizzled_shape` says.

    Source: cuBLAS, "1D block scaling factors layout", and torchao's `to_blocked`.
    """
    rows, columns = scales.shape
    row_tiles, column_tiles = _tiles((rows, columns))
    padded = scales.new_zeros(row_tiles * 128, column_tiles * 4)
    padded[:rows, :columns] = scales
    tiles = padded.view(row_tiles, 4, 32, column_tiles, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(swizzled_shape((rows, columns)))


def unswizzled(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `swizzled`; `shape` is that of the scales in order."""
    row_tiles, column_tiles = _tiles(shape)
    tiles = scales.reshape(row_tiles, column_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(row_tiles * 128, column_tiles * 4)[: shape[0], : shape[1]]


def swizzled_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of swizzled scales, padding included, from that of the scales in order."""
    row_tiles, column_tiles = _tiles(shape)
    return row_tiles * 32, column_tiles * 16


def _tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return kernels.blocks_of(shape[0], 128), kernels.blocks_of(shape[1], 4)
