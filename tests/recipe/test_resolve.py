"""Paths, and a recipe written back as TOML."""

import json
from pathlib import Path

import attrs
import pytest
from recipe_support import VALID, load, write

from quantune.recipe.resolve import to_dict, to_toml, with_absolute_paths


def test_inputs_are_relative_to_the_recipe_and_the_run_folder_is_named_after_it(tmp_path):
    path = write(tmp_path, VALID)
    recipe = with_absolute_paths(load(path), path)
    assert recipe.data.train[0].path == str(tmp_path / "train.jsonl")
    assert recipe.model.base == "builtin:mini"
    assert recipe.output.dir == "runs/recipe"


def test_a_base_is_a_path_when_it_looks_like_one_or_is_there(tmp_path):
    (tmp_path / "model").mkdir()
    for base, expected in [
        ("./model", str(tmp_path / "model")),
        ("model", str(tmp_path / "model")),
        ("org/model", "org/model"),
        ("/abs", "/abs"),
    ]:
        path = write(tmp_path, VALID.replace("builtin:mini", base))
        assert with_absolute_paths(load(path), path).model.base == expected


def test_the_resolved_recipe_loads_to_an_equal_one_with_every_default_written_out(tmp_path):
    path = write(tmp_path, VALID)
    recipe = with_absolute_paths(load(path), path)
    text = to_toml(recipe)
    assert load(write(tmp_path, text)) == recipe
    for key in ("block_size = 64", "double_quant = true", "weight_decay = 0.0", 'schedule = "cosine"'):
        assert key in text
    assert "max_samples" not in to_dict(recipe)["evaluation"]


def test_every_input_path_is_relative_to_the_recipe_and_not_to_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    text = VALID.replace('"builtin:mini"', '"../base"\ntokenizer = "./tok"\nchat_template = "chat.jinja"')
    text += '[[data.eval]]\npath = "/data/eval.csv"\nformat = "chat"\n'
    write(tmp_path / "recipes", text)
    path = Path("recipes/recipe.toml")
    recipe = with_absolute_paths(load(path), path)
    assert recipe.model.base == str(tmp_path / "base")
    assert recipe.model.tokenizer == str(tmp_path / "recipes" / "tok")
    assert recipe.model.chat_template == str(tmp_path / "recipes" / "chat.jinja")
    assert recipe.data.eval[0].path == "/data/eval.csv"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = VALID.replace("builtin:mini", "~/base").replace("train.jsonl", "~/train.jsonl")
    path = write(tmp_path, text + '[output]\ndir = "~/run"\n')
    recipe = with_absolute_paths(load(path), path)
    found = (recipe.model.base, recipe.data.train[0].path, recipe.output.dir)
    assert found == tuple(str(tmp_path / "home" / name) for name in ("base", "train.jsonl", "run"))


def test_a_named_run_folder_stays_as_it_is(tmp_path):
    path = write(tmp_path, VALID + '[output]\ndir = "out/here"\n')
    assert with_absolute_paths(load(path), path).output.dir == "out/here"


def test_a_hub_dataset_has_no_path(tmp_path):
    path = write(tmp_path, VALID.replace('path = "train.jsonl"', 'dataset = "org/data"'))
    source = with_absolute_paths(load(path), path).data.train[0]
    assert source.path is None and source.dataset == "org/data"


@pytest.mark.parametrize(
    "change",
    [
        ("[adapter]", "[adapter]\nmodules_to_save = ['lm_head']"),
        ('["q_proj", "v_proj"]', "'.*\\.(q|v)_proj'"),
        ('format = "chat"', 'format = "instruct"\ntemplate = "Q \\"{a}\\"\\n\\tA \\\\ ☃ # = [x]: "'),
        ("[[data.train]]", '[[data.eval]]\npath = "e.csv"\nformat = "chat"\n\n[[data.train]]'),
        ("max_steps = 10", "epochs = 0.5\nmax_grad_norm = inf\neps = 1e-30\nmicro_batch_size = 1"),
        ('weight_dtype = "nf4"', 'weight_dtype = "int8"\nskip = ["layers.0"]'),
        ('[quantization]\nbackend = "toy"\nweight_dtype = "nf4"\n', ""),
    ],
)
def test_any_recipe_written_as_toml_loads_to_an_equal_one(tmp_path, change):
    recipe = load(write(tmp_path, VALID.replace(*change)))
    text = to_toml(recipe)
    assert load(write(tmp_path, text)) == recipe
    assert to_toml(load(write(tmp_path, text))) == text


def test_every_default_that_is_set_is_written_out(tmp_path):
    recipe = load(write(tmp_path, VALID))
    text = to_toml(recipe)
    for section in attrs.fields(type(recipe)):
        table = getattr(recipe, section.name)
        for key, value in attrs.asdict(table, recurse=False).items():
            written = value not in (None, {}) and key not in ("options", "train", "eval", "special_tokens")
            assert not written or f"\n{key} = " in text.split(f"[{section.name}]")[1].split("\n[")[0], key


def test_the_canonical_form_is_plain_json(tmp_path):
    document = to_dict(load(write(tmp_path, VALID)))
    assert json.loads(json.dumps(document)) == document
    assert document["quantization"]["block_size"] == 64 and "options" not in document["quantization"]
