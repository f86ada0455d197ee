"""Peak memory and seconds of merging an adapter, beside PEFT's `merge_and_unload` and beside copying the base.

    python benchmarks/merge_speed.py --size 350M

Each way runs in a process of its own, in turns, and the best of its rounds counts. Memory is anonymous memory above
what the process held before. What PEFT merges onto is the unquantized base: it has no way to the one that was trained
on. quantune's seconds hold the hashing of the base's files, by which it knows that it is the right one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch
from models import make_model

WAYS = ("copy of the base", "quantune, onto the original", "quantune, onto dequantized nf4", "PEFT merge_and_unload")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_model(arguments.size, folder)
        with context.Pool(1) as pool:
            pool.apply(prepare, (base, folder / "adapter"))
        for _ in range(arguments.rounds):
            for way in WAYS:
                with context.Pool(1) as pool:
                    row = pool.apply(merge_one, (way, base, folder / "adapter", folder / "merged"))
                best = rows.setdefault(way, row)
                rows[way] = {key: min(best[key], row[key]) for key in row}
        nbytes = (base / "model.safetensors").stat().st_size
    for way, row in rows.items():
        speed = nbytes / row["seconds"] / 2**20
        print(f"{way:32} peak {row['peak_mib']:6.0f} MiB   {row['seconds']:5.1f} s   {speed:6.0f} MiB/s")
    if arguments.json:
        setting = {"size": arguments.size, "bytes": nbytes, "rounds": arguments.rounds, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def prepare(base: Path, adapter: Path) -> None:
    """Save an adapter on all linear layers whose every weight is random, and give the base a tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from quantune.checkpoint.fingerprint import hash_files
    from quantune.merge.trained import BASE_FILES
    from quantune.model import mini
    from quantune.model.adapter import ORIGIN

    for path in mini.PATH.glob("tokenizer*"):
        shutil.copy(path, base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(adapter))
    hashes = hash_files([*base.glob("*.safetensors"), base / "config.json"])
    (adapter / ORIGIN).write_text(json.dumps({"fingerprints": {BASE_FILES: hashes}}), encoding="utf-8")


def merge_one(way: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Merge one way; peak memory and seconds."""
    import peft  # noqa: F401  # imported before the measurement, as everything else
    import transformers  # noqa: F401

    import quantune.merge.merge  # noqa: F401
    from quantune.training.memory import measure_peak

    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    with measure_peak(torch.device("cpu")) as peak:
        if way.startswith("copy"):
            shutil.copytree(base, out)
        elif way.startswith("PEFT"):
            merge_with_peft(base, adapter, out)
        else:
            merge_with_quantune(base, adapter, out, way.endswith("nf4"))
    return {"peak_mib": peak.nbytes / 2**20, "seconds": time.perf_counter() - begun}


def merge_with_peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)


def merge_with_quantune(base: Path, adapter: Path, out: Path, quantized: bool) -> None:
    from quantune.backends.bnb import BnbOptions
    from quantune.merge.merge import merge
    from quantune.merge.request import MergeRequest, Setting
    from quantune.merge.trained import find_adapter
    from quantune.recipe.schema import ModelConfig, QuantizationConfig

    nf4 = QuantizationConfig(backend="bnb", options=BnbOptions().resolved())
    setting = Setting(model=ModelConfig(base=str(base)), quantization=nf4, adapter=None, seed=0, precision="fp32")
    request = MergeRequest(
        adapters=(find_adapter(adapter),),
        weights=(1.0,),
        setting=setting,
        out=out,
        onto="dequantized" if quantized else "original",
        verify=False,
    )
    merge(request, torch.device("cpu"), Silent())


class Silent:
    """An observer that looks away."""

    def __getattr__(self, name: str):
        return lambda *arguments: None


if __name__ == "__main__":
    main()
