"""Dequantizing one weight in every built-in format, beside each format's own library.

    python benchmarks/dequantize.py --size 2048

Times are medians of interleaved rounds (a copy of the output, ours, the library's, and again), in milliseconds and in
multiples of the copy: what the machine does besides falls on all alike. Ours writes into a reused buffer, as in
training. The output is fp32 on a CPU and bf16 on CUDA. Equality with the library is checked on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor

from quantune.backends import registry
from quantune.backends.backend import Backend, pack_weight
from quantune.backends.layout import PackedWeight

logging.getLogger("torchao").setLevel(logging.ERROR)
Run = Callable[[], Tensor]


@attrs.frozen(kw_only=True)
class Contender:
    """A format, and how its own library dequantizes the same weight."""

    name: str
    backend: Backend
    packed: PackedWeight
    library: str
    run_library: Run | None
    """None where the library can't on this device."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    weight = (torch.randn(arguments.size, arguments.size) * 0.02).to(device, torch.bfloat16).to(dtype)
    rows = [measure(contender, dtype, arguments.rounds) for contender in contenders(weight, dtype)]
    print(f"{arguments.size} x {arguments.size} to {dtype}, {device}; x = multiples of a copy of the output")
    for row in rows:
        own = "-" if row["library_ms"] is None else f"{row['library_ms']:8.2f} ms  x{row['library_copies']:6.1f}"
        print(
            f"{row['format']:14} {row['bits']:5.2f} bits  quantune {row['ms']:6.2f} ms  x{row['copies']:4.1f}   "
            f"{row['library']:28} {own:>20}  equal: {row['equal']}"
        )
    if arguments.json:
        setting = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        setting |= {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "dtype": str(dtype)}
        if device.type == "cuda":
            setting["gpu"] = torch.cuda.get_device_name(device)
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(contender: Contender, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """One row of the table."""
    backend, packed = contender.backend, contender.packed
    out = torch.empty(packed.layout.shape, dtype=dtype, device=packed.data.device)
    source = torch.zeros_like(out)
    runs: dict[str, Run] = {
        "copy": lambda: out.copy_(source),
        "ours": lambda: backend.dequantize(packed, dtype, out),
    }
    equal: bool | None = None
    if contender.run_library is not None:
        runs["library"] = contender.run_library
        equal = torch.equal(backend.dequantize(packed, dtype), contender.run_library().to(dtype))
    times = interleaved(runs, rounds, out.device)
    return {
        "format": contender.name,
        "bits": packed.layout.bits_per_weight,
        "ms": times["ours"],
        "copies": times["ours"] / times["copy"],
        "copy_ms": times["copy"],
        "library": contender.library,
        "library_ms": times.get("library"),
        "library_copies": times["library"] / times["copy"] if "library" in times else None,
        "equal": equal,
    }


def interleaved(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 3):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number >= 3:  # warmed up
                spent[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def contenders(weight: Tensor, dtype: torch.dtype) -> Iterator[Contender]:
    """Every built-in format beside its library."""
    for name, options, library, prepare in (
        ("bnb nf4", {"weight_dtype": "nf4", "double_quant": False}, "bitsandbytes", bnb_4bit),
        ("bnb fp4", {"weight_dtype": "fp4", "double_quant": False}, "bitsandbytes", bnb_4bit),
        ("bnb int8", {"weight_dtype": "int8"}, "bitsandbytes", bnb_int8),
        ("torchao int4", {"weight_dtype": "int4"}, "torchao (none without CUDA)", None),
        ("torchao nf4", {"weight_dtype": "nf4"}, "torchao", torchao_nf4),
        ("torchao nvfp4", {"weight_dtype": "nvfp4"}, "torchao", torchao_nvfp4),
        ("torchao int8", {"weight_dtype": "int8"}, "torchao", torchao_int8),
        ("torchao fp8", {"weight_dtype": "fp8"}, "torchao", torchao_fp8),
        ("mxfp4", {}, "torchao", torchao_mxfp4),
        ("mxfp4", {}, "transformers", transformers_mxfp4),
        ("fp8", {}, "transformers", transformers_fp8),
    ):
        backend_name = name.split()[0]
        cls = registry.options_of(backend_name)
        made = cls(**options)
        backend = registry.load_backend(registry.describe(backend_name))
        packed = pack_weight(backend, weight, made.resolved() if hasattr(made, "resolved") else made)
        run = None
        with contextlib.suppress(ImportError):
            run = None if prepare is None else prepare(weight, packed, dtype)
        yield Contender(name=name, backend=backend, packed=packed, library=library, run_library=run)


def bnb_4bit(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight, quant_type=packed.layout.options.weight_dtype)
    return lambda: bnb.dequantize_4bit(codes, state)


def bnb_int8(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    import bitsandbytes.functional as bnb

    views = packed.views()
    return lambda: bnb.int8_vectorwise_dequant(views["codes"], views["absmax"])


def torchao_nf4(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    tensor = NF4Tensor.from_tensor(weight, 64, 256)
    return tensor.get_original_weight


def torchao_nvfp4(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    tensor = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    return lambda: tensor.dequantize(dtype)


def torchao_int8(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    tensor = Int8Tensor.from_hp(weight, PerRow())
    return lambda: tensor.dequantize(dtype)


def torchao_fp8(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from torchao.quantization.quantize_.workflows import Float8Tensor

    tensor = Float8Tensor.from_hp(weight)
    return lambda: tensor.dequantize(dtype)


def torchao_mxfp4(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    tensor = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    return lambda: tensor.dequantize(dtype)


def transformers_mxfp4(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    views = packed.views()
    blocks, scales = views["blocks"].unflatten(1, (-1, 16))[None], views["scales"][None]
    return lambda: convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T


def transformers_fp8(weight: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Run:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    views, operation = packed.views(), Fp8Dequantize(None)
    return lambda: operation._dequantize_one(views["weight"], views["weight_scale_inv"], dtype)


if __name__ == "__main__":
    main()
