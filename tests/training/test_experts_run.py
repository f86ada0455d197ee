"""Whole runs on a mixture of experts with adapters on its experts, and runs that start from an adapter."""

import json
import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file
from support import quantization
from training.test_matrix import losses, run
from transformers import MixtralConfig, MixtralForCausalLM

from quantune.errors import ModelError, ResumeError
from quantune.model import mini
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.answer import answer

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small mixture with the built-in tokenizer, and a few conversations."""
    folder = tmp_path_factory.mktemp("experts")
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini.PATH / name, folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"After {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]}
        for n in range(16)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, name, **adapter):
    keys = {"r": 4, "target_parameters": ("experts.gate_up_proj", "experts.down_proj"), **adapter}
    return Recipe(
        model=ModelConfig(base=str(folder / "base")),
        quantization=quantization(),
        adapter=AdapterConfig(**keys),
        data=DataConfig(train=(SourceConfig(path=str(folder / "train.jsonl"), format="chat"),)),
        training=TrainingConfig(
            max_steps=STEPS, batch_size=4, learning_rate=1e-2, precision="fp32", activation_checkpointing=True
        ),
        checkpoint=CheckpointConfig(every_steps=STEPS // 2),
        output=OutputConfig(dir=str(folder / name)),
    )


def adapter_bytes(run_folder):
    return (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()


def interrupt(run_folder):
    """Leave a finished run as if it had been killed half-way."""
    shutil.rmtree(run_folder / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(run_folder / "adapter")
    (run_folder / "status.json").write_text(json.dumps({"state": "interrupted", "step": STEPS // 2}))


@pytest.fixture(scope="module")
def finished(folder):
    """A finished run with adapters on the experts."""
    run(recipe(folder, "first"), folder / "first")
    return folder / "first"


def test_a_run_adapts_experts_learns_and_answers(folder, finished):
    found = losses(finished)
    assert found[-1] < found[0] - 0.2
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "experts" in name)
    assert sum("experts" in name for name in tensors) == 2 * 2 * 2
    made = recipe(folder, "first")
    asked = ["After 3?"]
    assert answer(made, finished / "adapter", asked, max_new_tokens=3) != answer(made, None, asked, max_new_tokens=3)


def test_a_resumed_run_ends_with_the_same_bytes(finished, folder):
    before, expected = adapter_bytes(finished), losses(finished)
    interrupt(finished)
    run(recipe(folder, "first"), finished, resume=True)
    assert adapter_bytes(finished) == before and torch.equal(losses(finished), expected)


def test_a_run_that_starts_from_an_adapter_goes_on_from_it_and_resumes(finished, folder):
    made = recipe(folder, "second", start_from=str(finished / "adapter"))
    second = folder / "second"
    run(made, second)
    assert losses(second)[0] < losses(finished)[0] - 0.2
    manifest = json.loads((second / "manifest.json").read_text())
    assert set(manifest["fingerprints"]["the adapter that training starts from"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    before = adapter_bytes(second)
    interrupt(second)
    run(made, second, resume=True)
    assert adapter_bytes(second) == before


def test_a_run_does_not_resume_from_another_start(finished, folder):
    start = shutil.copytree(finished / "adapter", folder / "start")
    made = recipe(folder, "third", start_from=str(start))
    run(made, folder / "third")
    interrupt(folder / "third")
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    with pytest.raises(ResumeError, match="the adapter that training starts from"):
        run(made, folder / "third", resume=True)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_parameters": ("experts.up_proj",)}, '"experts.up_proj" matches no weight of experts'),
        ({"r": 8, "start_from": "first"}, r"r is 4 there, 8 here \(write r = 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_data_is_read(finished, folder, adapter, message):
    if "start_from" in adapter:
        adapter = {**adapter, "start_from": str(finished / "adapter")}
    made = recipe(folder, "refused", **adapter)
    gone = attrs.evolve(made.data, train=(SourceConfig(path=str(folder / "gone.jsonl"), format="chat"),))
    with pytest.raises(ModelError, match=message):
        run(attrs.evolve(made, data=gone), folder / "refused")
