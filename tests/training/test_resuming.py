"""What a run that goes on may do without, what it makes up for, and when a run evaluates."""

import json
import os
import shutil
import signal

import attrs
import pytest
import torch
from support import Silent

from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import InputError, InterruptedRun, ResumeError
from quantune.model.base import open_base
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.evaluate import generate
from quantune.training.loop import evaluation_due
from quantune.training.run import train


class StopAt(Silent):
    """Asks the run to stop in a step."""

    def __init__(self, step):
        self.at = step

    def step(self, metrics):
        if metrics.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def recipe(tmp_path):
    """Four steps, evaluated after every other one."""
    rows = [{"text": f"The number after {n} is {n + 1}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), format="completion")
    return Recipe(
        model=ModelConfig(base="builtin:mini", config={"num_hidden_layers": 1}),
        adapter=AdapterConfig(r=4),
        data=DataConfig(train=(source,), eval=(source,)),
        training=TrainingConfig(max_steps=4, batch_size=2, precision="fp32"),
        evaluation=EvaluationConfig(every_steps=2, at_end=False, max_samples=1),
        checkpoint=CheckpointConfig(every_steps=2),
    )


def run(made, folder, mode="new", observer=None):
    with RunFolder.open(folder, mode) as opened:
        return train(made, opened, observer or Silent(), resume=mode == "resume")


def interrupt(made, folder, step=2):
    with pytest.raises(InterruptedRun):
        run(made, folder, observer=StopAt(step))


def evaluated(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["event"] == "evaluation"]


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"every_steps": 2, "at_end": False}, [2, 4, 6]),
        ({"every_steps": 4}, [4, 6]),
        ({"every_steps": 4, "at_end": False, "at_start": True}, [0, 4]),
    ],
)
def test_an_evaluation_is_due_after_the_steps_that_the_recipe_names(config, steps):
    assert [step for step in range(7) if evaluation_due(EvaluationConfig(**config), step, 6)] == steps


def test_an_evaluation_that_a_run_asked_to_stop_left_out_is_made_when_it_goes_on(recipe, tmp_path):
    folder = tmp_path / "run"
    interrupt(recipe, folder)
    assert evaluated(folder) == []
    run(recipe, folder, "resume")
    assert evaluated(folder) == [2, 4]


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("shuffle", "put it back"),
        ("packing", "put it back"),
        ("pad_to_max_length", "--allow-change data.pad_to_max_length"),
    ],
)
def test_a_run_is_not_resumed_in_another_order_or_shape(recipe, tmp_path, key, way):
    folder = tmp_path / "run"
    interrupt(recipe, folder)
    other = attrs.evolve(recipe.data, **{key: not getattr(recipe.data, key)})
    with pytest.raises(ResumeError, match=rf"data.{key} was (true|false), is (true|false)  \(.*{way}\)"):
        run(attrs.evolve(recipe, data=other), folder, "resume")


def test_a_run_goes_on_without_the_adapter_it_started_from_and_never_clears_it(recipe, tmp_path):
    run(recipe, tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    made = attrs.evolve(recipe, adapter=attrs.evolve(recipe.adapter, start_from=str(start)))
    with pytest.raises(InputError, match=r"lies in the folder of this run.*choose another \[output\] dir"):
        run(made, tmp_path / "first", "overwrite")
    assert start.is_dir()

    run(made, tmp_path / "whole")
    interrupt(made, tmp_path / "second")
    shutil.rmtree(start)
    run(made, tmp_path / "second", "resume")
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("second", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["fingerprints"]["the adapter that training starts from"]


def test_a_start_with_the_rows_of_other_tokens_is_refused(recipe, tmp_path):
    def with_tokens(*tokens, **adapter):
        model = attrs.evolve(recipe.model, added_tokens=tokens)
        return attrs.evolve(
            recipe, model=model, adapter=AdapterConfig(r=4, modules_to_save=("embed_tokens",), **adapter)
        )

    run(with_tokens("<a>", "<b>"), tmp_path / "first")
    start = str(tmp_path / "first" / "adapter")
    with pytest.raises(InputError, match='the row of the added token "<b>" is that of "<a>" there'):
        run(with_tokens("<b>", "<a>", start_from=start), tmp_path / "second")


def test_an_answer_ends_where_the_chat_template_ends_it():
    """The end of turn of this template is a token, and neither the tokenizer's end token nor the model's."""
    model = ModelConfig(base="builtin:mini", chat_template="chatml", added_tokens=("<|im_end|>",))
    tokenizer = open_base(model).tokenizer
    end, (said,) = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("a", add_special_tokens=False).input_ids

    class Answering:
        def generate(self, *, input_ids, generation_config, **more):
            assert generation_config.eos_token_id == sorted([tokenizer.eos_token_id, end])
            return torch.cat([input_ids, torch.tensor([[said, end, said]])], dim=1)

    prompt = torch.ones(1, 3, dtype=torch.long)
    assert generate(Answering(), prompt, prompt, tokenizer, max_new_tokens=3, pad_id=0) == ["a"]
