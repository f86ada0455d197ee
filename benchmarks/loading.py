"""Peak memory and seconds of loading a model packed, against loading it as it is in bf16.

    python benchmarks/loading.py --size 350M

Each way runs in a process of its own. Memory is anonymous memory (on CUDA what torch allocated) above what the process
held before; the packed size is what the model's parameters take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from models import base_of, make_model

WAYS = ("quantune nf4", "quantune int8", "transformers bf16", "transformers + bitsandbytes nf4")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350M")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(arguments.size, Path(folder))
        for way in WAYS:
            with context.Pool(1) as pool:
                rows[way] = pool.apply(load, (way, path, arguments.device))
    for way, row in rows.items():
        print(f"{way:32} holds {row['held_mib']:6.0f} MiB   peak {row['peak_mib']:6.0f} MiB   {row['seconds']:5.1f} s")
    if arguments.json:
        setting = {"size": arguments.size, "device": arguments.device, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def load(way: str, folder: Path, device_name: str) -> dict[str, float]:
    """Load one way; bytes of the parameters, peak and seconds."""
    import bitsandbytes  # noqa: F401  # imported before the measurement, as everything else
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import quantune.model.load  # noqa: F401
    from quantune.training.memory import measure_peak

    device = torch.device(device_name)
    dtype = torch.bfloat16
    begun = time.perf_counter()
    with measure_peak(device) as peak:
        if way.startswith("quantune"):
            model = load_quantune(folder, device, dtype, way.split()[-1])
        else:
            quantization = None
            if "bitsandbytes" in way:
                quantization = BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
                )
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
            )
    seconds = time.perf_counter() - begun
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"held_mib": held / 2**20, "peak_mib": peak.nbytes / 2**20, "seconds": seconds}


def load_quantune(folder: Path, device: torch.device, dtype: torch.dtype, weight_dtype: str):
    from quantune.backends.bnb import BnbOptions
    from quantune.model.load import load_model
    from quantune.recipe.schema import QuantizationConfig

    base = base_of(folder)
    options = BnbOptions(weight_dtype=weight_dtype).resolved()
    return load_model(base, QuantizationConfig(backend="bnb", options=options), compute_dtype=dtype, device=device)


if __name__ == "__main__":
    main()
