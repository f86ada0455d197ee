"""What packing costs after plain and after quantization-aware training, on the built-in model.

    python benchmarks/qat.py --json benchmarks/results/qat-mini-cpu.json
    python benchmarks/qat.py --steps 60 --rate 0.1 --adapter lora --format mxfp4 --format "bnb nf4" \\
        --json benchmarks/results/qat-small-updates-mini-cpu.json

Every row is trained with the data of recipes/quickstart.toml and the same seed, and evaluated on its held-out phrases:
as it was trained, and with base and adapter packed together in the format.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from quantune.backends import registry
from quantune.checkpoint.run_folder import RunFolder
from quantune.data.prepare import prepare
from quantune.distributed.sharding import Root
from quantune.model.base import open_base, skeleton
from quantune.model.device import choose_device
from quantune.model.qat import plan_rounding
from quantune.model.trained import load_trained_adapter, load_trained_base
from quantune.recipe.load import load_recipe
from quantune.recipe.resolve import with_absolute_paths
from quantune.recipe.schema import QatConfig, QuantizationConfig, Recipe
from quantune.training.evaluate import evaluate
from quantune.training.loss import build_loss
from quantune.training.observer import SilentObserver
from quantune.training.run import RunResult, train

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
FORMATS: dict[str, dict[str, Any]] = {
    "bnb nf4": {"backend": "bnb", "weight_dtype": "nf4"},
    "torchao int4": {"backend": "torchao", "weight_dtype": "int4", "group_size": 64},
    "mxfp4": {"backend": "mxfp4"},
}
RATES = {"lora": 2e-3, "full": 2e-4}


@attrs.frozen(kw_only=True)
class Way:
    """A way to train for a format."""

    name: str
    adapter: str
    packed: bool
    """Whether it trains on the packed base."""
    qat: QatConfig | None
    measured: QatConfig
    """What makes packing of what it trained: rounding in evaluation."""
    late: bool = False
    """Whether it rounds in the last 40 % of the steps only."""


PACKED = QatConfig(lora_base="packed")
DENSE = QatConfig(lora_base="dense")
WAYS = (
    Way(name="LoRA on the packed base", adapter="lora", packed=True, qat=None, measured=PACKED),
    Way(name='the same, qat (lora_base = "packed")', adapter="lora", packed=True, qat=PACKED, measured=PACKED),
    Way(name="LoRA on the original base", adapter="lora", packed=False, qat=None, measured=DENSE),
    Way(name="the same, qat", adapter="lora", packed=True, qat=DENSE, measured=DENSE),
    Way(name="the same, qat in the last 40 %", adapter="lora", packed=True, qat=DENSE, measured=DENSE, late=True),
    Way(name="all linear layers", adapter="full", packed=False, qat=None, measured=DENSE),
    Way(name="the same, qat", adapter="full", packed=True, qat=DENSE, measured=DENSE),
)


def main() -> None:
    """Train, pack, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.0, help="multiply the learning rates: smaller, smaller updates")
    parser.add_argument("--adapter", choices=RATES, help="both by default")
    parser.add_argument("--format", action="append", choices=FORMATS, help="all by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    print("| format | trained | packed base | as trained | packed |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(arguments, Path(folder)):
            print(
                f"| {row['format']} | {row['way']} | {row['base']:.3f} | {row['trained']:.3f} | {row['packed']:.3f} |"
            )
            rows.append(row)
    if arguments.json:
        setting = {"steps": arguments.steps, "batch": arguments.batch, "rates": RATES, "rate": arguments.rate}
        document = {"setting": setting, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each format and way; what trains on the original base is trained once for all formats."""
    trained: dict[str, RunResult] = {}
    for number, name in enumerate(arguments.format or FORMATS):
        made_options = registry.options_of(FORMATS[name]["backend"])(**_options(name))
        options = made_options.resolved() if hasattr(made_options, "resolved") else made_options
        quantization = QuantizationConfig(backend=FORMATS[name]["backend"], options=options)
        for index, way in enumerate(WAYS):
            if arguments.adapter not in (None, way.adapter):
                continue
            made = _recipe(way, quantization, arguments)
            key = f"{number}-{index}" if way.packed else f"{index}"
            if key not in trained:
                with RunFolder.open(folder / key, "new") as opened:
                    trained[key] = train(made, opened, SilentObserver())
            target = attrs.evolve(made, quantization=quantization)
            target = attrs.evolve(target, training=attrs.evolve(target.training, qat=way.measured))
            yield {
                "format": name,
                "way": way.name,
                "base": _loss(target, None),
                "trained": trained[key].evaluations[-1].loss,
                "packed": _loss(target, trained[key].adapter),
            }


def _options(name: str) -> dict[str, Any]:
    return {key: value for key, value in FORMATS[name].items() if key != "backend"}


def _recipe(way: Way, quantization: QuantizationConfig, arguments: argparse.Namespace) -> Recipe:
    qat = way.qat
    if qat is not None and way.late:
        qat = attrs.evolve(qat, fake_quant_after_steps=arguments.steps * 6 // 10)
    made = with_absolute_paths(load_recipe(RECIPE, options_of=registry.options_of).recipe, RECIPE)
    return attrs.evolve(
        made,
        quantization=quantization if way.packed else None,
        adapter=attrs.evolve(made.adapter, type=way.adapter),
        training=attrs.evolve(
            made.training,
            max_steps=arguments.steps,
            batch_size=arguments.batch,
            learning_rate=arguments.rate * RATES[way.adapter],
            precision="fp32",
            qat=qat,
        ),
        evaluation=attrs.evolve(made.evaluation, at_start=False, exact_match=False),
        checkpoint=attrs.evolve(made.checkpoint, every_steps=None),
    )


def _loss(recipe: Recipe, adapter: Path | None) -> float:
    """Held-out loss per target token, nats."""
    device = choose_device("auto")
    base = open_base(recipe.model, recipe.quantization)
    training, adapter_config, rounding = recipe.training, recipe.adapter, None
    if adapter is not None:
        rounding = plan_rounding(skeleton(base), training.qat, recipe.quantization, adapter_config)
    model: Any = load_trained_base(
        base,
        None if adapter is None else adapter_config,
        seed=training.seed,
        precision=training.precision,
        compute_dtype=torch.float32,
        device=device,
        rounding=rounding,
    )
    if adapter is not None:
        model = load_trained_adapter(model, adapter, precision=training.precision, rounding=rounding)
    data = prepare(
        recipe.data, base.tokenizer, seed=0, vocabulary_size=base.config.vocab_size, observer=SilentObserver()
    )
    assert data.eval is not None
    loss = build_loss(model if adapter is None else model.get_base_model(), device)
    found = evaluate(
        Root(model),
        loss,
        data.eval.samples,
        base.tokenizer,
        recipe.evaluation,
        pad_id=base.pad_id,
        device=device,
        step=0,
    )
    return found.loss


if __name__ == "__main__":
    main()
