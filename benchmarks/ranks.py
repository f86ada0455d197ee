"""Peak memory per rank, seconds to load, and bytes and seconds of a step, at several world sizes.

    python benchmarks/ranks.py --size 350M --ranks 1 2 4

Each world size runs in processes of its own. Memory is each rank's anonymous memory (on CUDA what torch allocated)
above what it held before; the largest rank is shown. What a plain FSDP2 model of the same size gathers stands beside
what is gathered of the packed one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from models import VOCABULARY, base_of, make_model

STEPS = 3
TOKENS = (1, 256)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--weight-dtype", default="nf4", help="of the bnb backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(arguments.size, Path(folder))
        for size in arguments.ranks:
            rows[size] = measure(size, path, arguments.device, arguments.weight_dtype)
            print_row(size, rows[size])
    if arguments.json:
        setting = {
            "size": arguments.size,
            "device": arguments.device,
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "weight_dtype": arguments.weight_dtype,
            "tokens": TOKENS,
        }
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def print_row(size: int, row: dict[str, float]) -> None:
    print(
        f"{size} ranks  load {row['load_seconds']:5.1f} s  peak {row['load_peak_mib']:6.0f} MiB  "
        f"holds {row['held_mib']:6.0f} MiB  step {row['step_seconds']:5.2f} s  adds {row['step_peak_mib']:6.0f} MiB  "
        f"receives {row['received_mib']:7.1f} MiB (bf16 weights: {row['dense_mib']:7.1f} MiB)"
    )


def measure(size: int, path: Path, device: str, weight_dtype: str) -> dict[str, float]:
    """The figures of the rank where each is largest."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=run, args=(rank, size, port, path, device, weight_dtype, answers))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return {name: max(one[name] for one in found) for name in found[0]}


def run(rank: int, size: int, port: int, path: Path, device_name: str, weight_dtype: str, answers: Any) -> None:
    """One rank: load, attach an adapter, shard, and do a few steps."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    import bitsandbytes  # noqa: F401  # imported before anything is measured

    from quantune.backends.bnb import BnbOptions
    from quantune.distributed.sharding import Root, shard
    from quantune.distributed.shares import Shares
    from quantune.distributed.world import World, joined
    from quantune.model import adapter
    from quantune.model.device import choose_device
    from quantune.model.load import load_model
    from quantune.recipe.schema import AdapterConfig, QuantizationConfig
    from quantune.training.loss import build_loss
    from quantune.training.memory import measure_peak

    world = World.from_environment()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    device = choose_device(device_name, rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantization = QuantizationConfig(backend="bnb", options=BnbOptions(weight_dtype=weight_dtype).resolved())
    with joined(world, device, timedelta(minutes=10)) as mesh:
        begun = time.perf_counter()
        with measure_peak(device) as loading:
            shares = None if mesh is None else Shares(world=world, mesh=mesh, device=device)
            model = load_model(base_of(path), quantization, compute_dtype=dtype, device=device, shares=shares)
        load_seconds = time.perf_counter() - begun
        dense = sum(
            parameter.numel() if parameter.is_floating_point() else weights(model, name)
            for name, parameter in model.named_parameters()
        )
        root = Root(adapter.attach(model, AdapterConfig(), base_name="", seed=0))
        if mesh is not None:
            shard(root, mesh, device)
        held = sum(
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes
            for parameter in root.parameters()
        )
        loss = root(build_loss, model)
        root.reshard()
        optimizer = torch.optim.AdamW(adapter.trainable_parameters(root.model).values(), fused=True)
        tokens = torch.randint(0, VOCABULARY, TOKENS, device=device)
        root.train()
        root.traffic.take()
        seconds = []
        with measure_peak(device) as stepping:
            for _ in range(STEPS):
                begun = time.perf_counter()
                (root(loss, tokens, tokens) / (tokens.numel() * size)).backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - begun)
        received = root.traffic.take() / STEPS
        answers.put(
            {
                "load_seconds": load_seconds,
                "load_peak_mib": loading.nbytes / 2**20,
                "held_mib": held / 2**20,
                "step_seconds": sorted(seconds)[len(seconds) // 2],
                "step_peak_mib": stepping.nbytes / 2**20,
                "received_mib": received / 2**20,
                "dense_mib": 2 * 2 * dense * (size - 1) / size / 2**20,  # bf16, forward and backward
            }
        )


def weights(model: torch.nn.Module, name: str) -> int:
    """How many weights a packed linear layer's bytes stand for."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return layer.in_features * layer.out_features


if __name__ == "__main__":
    main()
