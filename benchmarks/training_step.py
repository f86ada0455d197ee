"""Seconds per optimizer step and peak memory of quantune against PEFT, on the same model, batch and dtype.

    python benchmarks/training_step.py --size 110M --batch 2 --length 512 --rounds 5

Every contender runs in a process of its own. Steps are interleaved: in each round every contender does one step while
the others wait, so that whatever else the machine does falls on all of them alike. Memory is the peak of anonymous
memory in a step above what the process holds between steps plus the model (on CUDA: what torch allocated at most).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from models import VOCABULARY, base_of, make_model

CONTENDERS = ("quantune nf4", "PEFT + bitsandbytes nf4", "PEFT dense")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="110M")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens that are targets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments.size, Path(folder))
        rows = measure(model, arguments)
    base = rows[CONTENDERS[1]]
    print(
        f"{arguments.size}, batch {arguments.batch} x {arguments.length}, {arguments.device}, ratios to {CONTENDERS[1]}"
    )
    for name, row in rows.items():
        print(
            f"{name:26} {row['seconds']:7.2f} s  x{row['seconds'] / base['seconds']:.2f}   "
            f"loaded {row['loaded_mib']:6.0f} MiB   step peak +{row['step_mib']:6.0f} MiB  "
            f"x{row['step_mib'] / base['step_mib']:.2f}   loss {row['loss']:.4f}"
        )
    if arguments.json:
        setting = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        document = {"setting": setting, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Interleave the contenders' steps."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    figures: dict[str, dict[str, float]] = {}
    for name in CONTENDERS:
        ours, theirs = context.Pipe()
        process = context.Process(target=contend, args=(name, model, arguments, theirs), daemon=True)
        process.start()
        processes.append(process)
        pipes[name] = ours
        figures[name] = ours.recv()  # loaded and warmed up
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, pipe in pipes.items():
            pipe.send("step")
            steps[name].append(pipe.recv())
    for name, pipe in pipes.items():
        pipe.send("stop")
        figures[name]["seconds"] = statistics.median(seconds for seconds, _ in steps[name])
        figures[name]["step_mib"] = max(nbytes for _, nbytes in steps[name]) / 2**20
    for process in processes:
        process.join()
    return figures


def contend(name: str, folder: Path, arguments: argparse.Namespace, pipe: Connection) -> None:
    """One contender: load, warm up, then a step whenever asked."""
    from quantune.training.memory import anonymous_bytes, measure_peak

    device = torch.device(arguments.device)
    held = anonymous_bytes() if device.type == "cpu" else torch.cuda.memory_allocated()
    model, loss = build(name, folder, device, arguments.checkpointing)
    loaded = (anonymous_bytes() if device.type == "cpu" else torch.cuda.memory_allocated()) - held
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    torch.manual_seed(1)
    input_ids = torch.randint(0, VOCABULARY, (arguments.batch, arguments.length), device=device)
    labels = input_ids.clone()
    labels[:, : int(arguments.length * (1 - arguments.targets))] = -100
    count = int((labels[:, 1:] != -100).sum())
    model.train()

    def step() -> float:
        value = loss(input_ids, labels, count)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(value.detach())

    first = step()
    step()
    pipe.send({"loaded_mib": loaded / 2**20, "loss": first})
    while pipe.recv() == "step":
        with measure_peak(device) as peak:
            begun = time.perf_counter()
            step()
            seconds = time.perf_counter() - begun
        pipe.send((seconds, peak.nbytes))


def build(name: str, folder: Path, device: torch.device, checkpointing: bool):
    """A model with LoRA of rank 16 on all linear layers, and its loss(input_ids, labels, target count)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "quantune nf4":
        model, loss = build_quantune(folder, device, dtype)
    else:
        model = build_peft(folder, device, dtype, packed="bitsandbytes" in name)

        def loss(input_ids, labels, count):
            return model(input_ids=input_ids, labels=labels, use_cache=False).loss

    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, loss


def build_quantune(folder: Path, device: torch.device, dtype: torch.dtype):
    from quantune.backends.bnb import BnbOptions
    from quantune.model import adapter
    from quantune.model.load import load_model
    from quantune.recipe.schema import AdapterConfig, QuantizationConfig
    from quantune.training.loss import build_loss

    base = base_of(folder)
    options = BnbOptions(double_quant=False).resolved()
    plan = QuantizationConfig(backend="bnb", options=options)
    model = adapter.attach(
        load_model(base, plan, compute_dtype=dtype, device=device), AdapterConfig(), base_name=folder.name, seed=0
    )
    total = build_loss(model.get_base_model())
    return model, lambda input_ids, labels, count: total(input_ids, labels) / count


def build_peft(folder: Path, device: torch.device, dtype: torch.dtype, *, packed: bool):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if packed:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    model.requires_grad_(False)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


if __name__ == "__main__":
    main()
