"""Runs whose recipe adds tokens: trained, resumed, answered from, and loaded by PEFT without quantune."""

import json
import shutil

import attrs
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from support import Silent, quantization
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantune.backends.registry import options_of
from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import ModelError, ResumeError
from quantune.model import mini
from quantune.model.adapter import load_adapter
from quantune.model.base import open_base
from quantune.model.load import load_model
from quantune.recipe.load import load_recipe
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    Recipe,
    SourceConfig,
    SpecialTokensConfig,
    TrainingConfig,
)
from quantune.training.answer import answer
from quantune.training.run import train

TOKENS = torch.tensor([[0, 300, 4096, 500, 4097, 4098]])
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe with tokens of every kind, trained in full with the embeddings."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": f"<ask>{n}", "response": f"{n + 1}<done>"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(folder / "train.jsonl"), format="instruct", template="{prompt}")
    return Recipe(
        model=ModelConfig(
            base="builtin:mini",
            special_tokens=SpecialTokensConfig(eos_token="<done>", pad_token="<fill>"),
            added_tokens=("<ask>",),
        ),
        adapter=AdapterConfig(r=4, modules_to_save=("embed_tokens",)),
        data=DataConfig(train=(source,)),
        training=TrainingConfig(max_steps=STEPS, batch_size=4, learning_rate=1e-2),
        checkpoint=CheckpointConfig(every_steps=STEPS // 2),
        output=OutputConfig(dir=str(folder)),
    )


def run(recipe, folder, *, resume=False):
    with RunFolder.open(folder, "resume" if resume else "new") as opened:
        return train(recipe, opened, Silent(), resume=resume)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, folder)
    return folder


def test_the_adapter_answers_the_same_in_plain_peft_after_the_base_was_resized(recipe, finished):
    base = load_model(open_base(recipe.model), None, compute_dtype=torch.float32, device=torch.device("cpu"))
    fresh = base(TOKENS).logits
    ours = load_adapter(base, finished / "adapter")(TOKENS).logits
    assert not torch.allclose(ours, fresh, atol=1e-2)

    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    assert tokenizer.convert_tokens_to_ids(["<done>", "<fill>", "<ask>"]) == [4096, 4097, 4098]
    plain = AutoModelForCausalLM.from_pretrained(mini.PATH, dtype=torch.float32)
    plain.resize_token_embeddings(len(tokenizer))
    torch.testing.assert_close(PeftModel.from_pretrained(plain, finished / "adapter")(TOKENS).logits, ours)
    resized_by_peft = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter", dtype=torch.float32)
    torch.testing.assert_close(resized_by_peft(TOKENS).logits, ours)


def test_the_rows_of_added_tokens_are_trained(finished):
    from safetensors.torch import load_file

    rows = load_file(finished / "adapter" / "adapter_model.safetensors")
    (embedding,) = (tensor for name, tensor in rows.items() if "embed_tokens" in name)
    assert embedding.shape == (4099, 256)
    done, fill, ask = embedding[4096:]
    assert not torch.equal(done, fill) and not torch.equal(ask, fill)  # all three began at the mean


def test_the_written_recipe_adds_the_same_tokens(recipe, finished):
    assert load_recipe(finished / "recipe.toml", options_of=options_of).recipe.model == recipe.model


def test_a_run_with_added_tokens_answers(recipe, finished):
    (text,) = answer(recipe, finished / "adapter", ["<ask>3"], max_new_tokens=4)
    assert "<fill>" not in text and "<done>" not in text


def test_a_resumed_run_grows_the_same_rows_and_ends_with_the_same_bytes(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    (folder / "status.json").write_text(json.dumps({"state": "interrupted", "step": STEPS // 2}))
    run(recipe, folder, resume=True)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (folder / "adapter" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"added_tokens": ("<ask>", "<more>")}, {"config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}}],
)
def test_a_run_is_not_resumed_with_other_tokens_or_another_configuration(recipe, finished, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "status.json").write_text(json.dumps({"state": "interrupted", "step": STEPS}))
    with pytest.raises(ResumeError, match=r"can't be resumed with the recipe as it is now"):
        run(attrs.evolve(recipe, model=attrs.evolve(recipe.model, **change)), folder, resume=True)


def test_untrained_tokens_are_refused_before_the_data_is_read(recipe, tmp_path):
    nowhere = DataConfig(train=(SourceConfig(path=str(tmp_path / "none.jsonl"), format="completion"),))
    made = attrs.evolve(recipe, adapter=AdapterConfig(r=4), data=nowhere)
    with pytest.raises(ModelError, match=r'<done>, <ask>.*modules_to_save = \["embed_tokens"\]'):
        run(made, tmp_path / "run")


def test_a_packed_base_trains_with_added_tokens_too(recipe, tmp_path):
    made = attrs.evolve(
        recipe,
        model=attrs.evolve(recipe.model, pad_vocabulary_to_multiple_of=64),
        quantization=quantization(backend="bnb", weight_dtype="nf4"),
        training=attrs.evolve(recipe.training, max_steps=1),
    )
    run(made, tmp_path / "run")
    (text,) = answer(made, tmp_path / "run" / "adapter", ["<ask>3"], max_new_tokens=2)
    assert isinstance(text, str)
