"""Paths, and a recipe written back as TOML."""

from pathlib import Path

import pytest
from test_load import VALID, load, write

from quantune.backends.registry import BUILT_IN, options_of
from quantune.errors import RecipeError
from quantune.recipe import schema
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import check_files
from quantune.recipe.reference import field_docs, render
from quantune.recipe.resolve import to_dict, to_toml, with_absolute_paths

ROOT = Path(__file__).parents[2]


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


def check(tmp_path, text):
    path = write(tmp_path, text)
    loaded = load_recipe(path, options_of=options_of)
    check_files(loaded, with_absolute_paths(loaded.recipe, path))


def test_files_that_are_there_are_fine(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    check(tmp_path, VALID)


def test_every_file_problem_is_reported_at_once_with_its_line(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "no_config").mkdir()
    text = VALID.replace('"builtin:mini"', '"./no_config"\nchat_template = "gone.jinja"')
    for name in ("empty.csv", "folder.json"):
        text += f'[[data.eval]]\npath = "{name}"\nformat = "chat"\n'
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    found = [(problem.line, problem.message) for problem in caught.value.problems]
    expected = [
        (2, "found no config.json"),
        (3, "there is no file"),
        (14, "there is no file"),
        (21, "the file is empty"),
        (24, "found a folder"),
    ]
    for (line, message), (expected_line, part) in zip(found, expected, strict=True):
        assert line == expected_line and part in message


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["config.json"], "found no weights", None),
        (["config.json", "pytorch_model.bin"], "found only pickled weights", "save_pretrained"),
    ],
)
def test_a_base_without_safetensors_is_refused(tmp_path, files, message, hint):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    for name in files:
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, VALID.replace("builtin:mini", "model"))
    (problem,) = caught.value.problems
    assert message in problem.message and (hint is None or hint in problem.hint)


@pytest.mark.parametrize(
    ("base", "message"), [("builtin:maxi", "no built-in model"), ("../nowhere", "there is no folder")]
)
def test_a_base_that_does_not_exist_is_refused(tmp_path, base, message):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=message):
        check(tmp_path, VALID.replace("builtin:mini", base))


CLASSES = [value for value in vars(schema).values() if isinstance(value, type) and hasattr(value, "__attrs_attrs__")]


@pytest.mark.parametrize("cls", [*CLASSES, *(options_of(name) for name in BUILT_IN)])
def test_every_field_is_documented(cls):
    assert {field.name for field in cls.__attrs_attrs__} <= field_docs(cls).keys()


def test_the_reference_in_docs_is_up_to_date():
    rendered = render({name: options_of(name) for name in BUILT_IN})
    assert (ROOT / "docs" / "recipe.md").read_text() == rendered, "run `make docs`"
