"""A run is the same run in one process, in two and in three."""

import functools
import json

import attrs
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load
from support import FORMATS, Silent, quantization

from quantune.checkpoint.run_folder import RunFolder
from quantune.distributed.sharding import blocks
from quantune.errors import InputError
from quantune.model import adapter
from quantune.model.base import open_base
from quantune.model.load import load_model
from quantune.recipe.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.run import train

CPU = torch.device("cpu")
CLOSE = 1e-5
"""Relative: sums over ranks are rounded in another order, and fifty steps of AdamW carry that on."""


@pytest.fixture(scope="module")
def recipe(bases, rows):
    """Ragged batches of three samples in micro-batches of one: two ranks have unequal shares."""
    source = SourceConfig(path=str(rows), format="instruct")
    return Recipe(
        model=ModelConfig(base=str(bases / "untied")),
        quantization=quantization(weight_dtype="nf4"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(train=(source,)),
        training=TrainingConfig(
            max_steps=5, batch_size=3, micro_batch_size=1, learning_rate=1e-3, precision="fp32", device="cpu"
        ),
    )


def _train(world, recipe, folder):
    path = folder / f"of-{world.size}"
    path.mkdir(exist_ok=True)
    train(recipe, RunFolder(path), Silent(), world=world)


def run(size, recipe, folder):
    """The metrics of a run in so many processes, and its adapter's bytes."""
    on_ranks(size, _train, recipe, folder)  # one, too: this process is not to have had a process group and fork later
    path = folder / f"of-{size}"
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return metrics, (path / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(metrics, event="step"):
    return torch.tensor([row["loss"] for row in metrics if row["event"] == event], dtype=torch.float64)


def evolved(recipe, **tables):
    return attrs.evolve(recipe, **{name: attrs.evolve(getattr(recipe, name), **keys) for name, keys in tables.items()})


FIFTY = ("bnb nf4", "torchao int4")
"""Formats whose runs take fifty steps; those of the others take twelve."""


@pytest.fixture(scope="module")
def over(recipe, bases, tmp_path_factory):
    """What runs over a format come to: its recipe, and the metrics of one, two and three processes."""

    @functools.cache
    def runs(name):
        steps = 50 if name in FIFTY else 12
        made = evolved(recipe, model={"base": str(bases / "shallow")}, training={"max_steps": steps})
        made = attrs.evolve(made, quantization=None if name is None else quantization(**FORMATS[name]))
        folder = tmp_path_factory.mktemp("over")
        return made, {size: run(size, made, folder)[0] for size in (1, 2, 3)}

    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, None])
def test_losses_agree_at_every_world_size_over_fifty_steps(over, name):
    made, metrics = over(name)
    assert len(losses(metrics[1])) == made.training.max_steps
    for size in (2, 3):
        torch.testing.assert_close(losses(metrics[size]), losses(metrics[1]), rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_gathered_is_the_quantized_bytes(over, name):
    made, metrics = over(name)
    model = load_model(
        open_base(made.model, made.quantization), made.quantization, compute_dtype=torch.float32, device=CPU
    )
    adapted = adapter.attach(model, made.adapter, base_name="", seed=0)
    in_blocks = [p for block in blocks(adapted) for p in block.parameters()]
    outside = [p for p in adapted.parameters() if all(p is not other for other in in_blocks)]
    trained = [p for p in in_blocks if p.requires_grad]
    for size, micro_batches in ((2, 2), (3, 1)):  # of a rank, in a batch of three samples

        def shares(parameters, size=size):
            """Bytes that the other ranks hold, each of them a share as long as the longest."""
            longest = (-(-p.shape[0] // size) * (p.nbytes // p.shape[0]) for p in parameters)
            return sum(longest) * (size - 1)

        # blocks are gathered forward and backward, the rest once; the gradients of what is trained are reduced once
        expected = size * micro_batches * (2 * shares(in_blocks) + shares(outside) + shares(trained))
        assert {row["communicated_bytes"] for row in metrics[size] if row["event"] == "step"} == {expected}


KINDS = {
    "dora": {"adapter": {"use_dora": True}},
    "dora on an unquantized base": {"adapter": {"use_dora": True}, "quantization": None},
    "pissa": {"adapter": {"init": "pissa"}},
    "loftq": {"adapter": {"init": "loftq"}},
    "head trained in full": {"adapter": {"modules_to_save": ("lm_head",)}},
    "embedding trained in full": {"adapter": {"modules_to_save": ("embed_tokens",)}},
    "adapted embedding": {"adapter": {"targets": ("embed_tokens", "q_proj")}},
    "tied embedding": {"base": "tied"},
    "tied embedding trained in full": {"base": "tied", "adapter": {"modules_to_save": ("lm_head", "embed_tokens")}},
    "biases": {"adapter": {"bias": "all"}},
    "added tokens": {
        "model": {"added_tokens": ("<new>", "<newer>")},
        "adapter": {"modules_to_save": ("embed_tokens", "lm_head")},
    },
    "activation checkpointing": {"training": {"activation_checkpointing": True}},
    "cpu offload": {"distributed": {"cpu_offload": True}},
    "packing": {"data": {"packing": True, "max_length": 64}},
    "skipped layers": {"quantization": ("o_proj", "layers.0")},
}


SHARED_ALIKE = ("pissa", "loftq", "activation checkpointing", "packing", "skipped layers", "tied embedding")
"""Kinds that share among ranks nothing but what every run does: two ranks are enough to try them on."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_ends_with_the_same_adapter(recipe, bases, tmp_path, kind):
    changes = dict(KINDS[kind])
    if "base" in changes:
        recipe = evolved(recipe, model={"base": str(bases / changes.pop("base"))})
    if "quantization" in changes:
        skip = changes.pop("quantization")
        recipe = attrs.evolve(recipe, quantization=skip and quantization(skip, weight_dtype="nf4"))
    made = evolved(recipe, **{**changes, "training": {"max_steps": 3, **changes.get("training", {})}})
    alone, adapter = run(1, made, tmp_path)
    expected = load(adapter)
    for size in (2,) if kind in SHARED_ALIKE else (2, 3):
        metrics, shared = run(size, made, tmp_path)
        torch.testing.assert_close(losses(metrics), losses(alone), rtol=CLOSE, atol=0)
        found = load(shared)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # AdamW's first steps move a weight by about the learning rate, whichever way a gradient near zero rounds
            assert (found[name] - tensor).abs().mean() <= 1e-5, name


def test_a_rank_reports_what_it_did(recipe, tmp_path):
    metrics, _ = run(2, recipe, tmp_path)
    for row in metrics:
        assert len(row["tokens_by_rank"]) == len(row["peak_bytes_by_rank"]) == 2
        assert sum(row["tokens_by_rank"]) == row["tokens"] and min(row["tokens_by_rank"]) > 0
        assert row["loss_max"] >= row["loss"] > 0
        assert 0 < row["data_share"] < 1
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert sum(row["tokens_per_second_by_rank"]) == pytest.approx(row["tokens_per_second"])
        assert min(row["peak_bytes_by_rank"]) > 1_000_000


def test_micro_batches_on_one_rank_or_one_on_each_are_the_same_batch(recipe, tmp_path):
    accumulated, first = run(1, evolved(recipe, training={"batch_size": 3, "micro_batch_size": 1}), tmp_path)
    at_once, second = run(3, evolved(recipe, training={"batch_size": 3, "micro_batch_size": 1}), tmp_path)
    torch.testing.assert_close(losses(accumulated), losses(at_once), rtol=1e-6, atol=0)


def test_an_evaluation_is_shared_and_finds_the_same(recipe, rows, tmp_path):
    source = SourceConfig(path=str(rows), format="instruct", limit=5)
    table = EvaluationConfig(every_steps=3, at_start=True, batch_size=2, exact_match=True, max_new_tokens=4)
    made = attrs.evolve(evolved(recipe, data={"eval": (source,)}), evaluation=table)
    alone, _ = run(1, made, tmp_path)
    expected = [row for row in alone if row["event"] == "evaluation"]
    assert [row["step"] for row in expected] == [0, 3, 5]
    for size in (2, 3):
        metrics, _ = run(size, made, tmp_path)
        found = [row for row in metrics if row["event"] == "evaluation"]
        torch.testing.assert_close(losses(metrics, "evaluation"), losses(alone, "evaluation"), rtol=CLOSE, atol=0)
        assert [row["examples"] for row in found] == [row["examples"] for row in expected]
        assert [row["samples"] for row in found] == [5, 5, 5]


def _refused(world, recipe, folder):
    """What is said where rank 1 has another recipe."""
    if world.rank == 1:
        recipe = attrs.evolve(recipe, evaluation=EvaluationConfig(every_steps=2))
    with pytest.raises(InputError) as caught:
        _train(world, recipe, folder)
    return str(caught.value)


def test_ranks_with_different_recipes_are_refused_before_they_wait_for_each_other(recipe, tmp_path):
    for said in on_ranks(2, _refused, recipe, tmp_path):
        assert "expected the same of every process, found [evaluation] of rank 1" in said
