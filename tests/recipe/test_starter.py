"""The first recipe that `quantune init` writes."""

import json
import re

import attrs
import pytest

from quantune.backends import registry
from quantune.backends.options import choose_dtype
from quantune.data.formats import read_example
from quantune.data.sources import Row
from quantune.errors import BackendError, DataError, InputError, ModelError
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import check_files
from quantune.recipe.resolve import with_absolute_paths
from quantune.recipe.schema import FORMATS
from quantune.recipe.starter import Choice, base_in, data_in, recipe_text, sample_rows, write_new

STORED = [(name, dtype) for name in registry.BUILT_IN for dtype in registry.describe(name).weight_dtypes or (None,)]


def choice(backend="bnb", weight_dtype="nf4", task="chat", **more):
    options = registry.options_of(backend)
    known = {"base": "builtin:mini", "backend": backend, "options": options, "data": "train.jsonl"}
    return Choice(**known, weight_dtype=weight_dtype, task=task, **more)


def loaded(folder, text, task="chat"):
    (folder / "train.jsonl").write_text(sample_rows(task))
    (folder / "recipe.toml").write_text(text)
    loaded = load_recipe(folder / "recipe.toml", options_of=registry.options_of)
    assert not loaded.warnings
    check_files(loaded, with_absolute_paths(loaded.recipe, folder / "recipe.toml"))
    return loaded.recipe


@pytest.mark.parametrize("task", FORMATS)
@pytest.mark.parametrize(("backend", "weight_dtype"), STORED)
def test_the_recipe_of_every_format_and_task_is_right(tmp_path, backend, weight_dtype, task):
    recipe = loaded(tmp_path, recipe_text(choice(backend, weight_dtype, task), "recipe.toml"), task)
    assert recipe.quantization.backend == backend and recipe.data.train[0].format == task
    assert getattr(recipe.quantization.options, "weight_dtype", None) == weight_dtype


@pytest.mark.parametrize("task", FORMATS)
def test_every_line_that_is_commented_out_can_be_had(tmp_path, task):
    text = recipe_text(choice(task=task), "recipe.toml")
    uncommented, count = re.subn(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    assert count >= 7 and loaded(tmp_path, uncommented, task).checkpoint.every_steps == 100


def test_every_key_has_its_documentation_above():
    lines = recipe_text(choice(), "recipe.toml").splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"#?[a-z_]+ = ", line)]
    assert len(keys) > 15 and all(lines[index - 1].startswith("# ") for index in keys)
    assert "# Rank of the update.\nr = 16\n" in "\n".join(lines)
    assert 'weight_dtype = "nf4"  # or "fp4", "int8"' in lines
    assert max(map(len, lines)) <= 100


def test_a_recipe_with_a_schema_begins_with_its_path():
    text = recipe_text(choice(schema="./recipe.schema.json"), "recipe.toml")
    assert text.startswith("#:schema ./recipe.schema.json\n# Trains")


@pytest.mark.parametrize("task", FORMATS)
def test_the_sample_rows_are_of_the_task(tmp_path, task):
    source = loaded(tmp_path, recipe_text(choice(task=task), "recipe.toml"), task).data.train[0]
    rows = [json.loads(line) for line in sample_rows(task).splitlines()]
    assert len(rows) == 20
    for row in rows:
        assert read_example(Row(values=row, where="row"), source)


def test_paths_of_the_command_line_are_named_as_the_recipe_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    recipes = tmp_path / "recipes" / "recipe.toml"
    assert data_in(recipes.relative_to(tmp_path), tmp_path / "data" / "a.jsonl") == f"{tmp_path}/data/a.jsonl"
    given = (tmp_path / "data" / "a.jsonl").relative_to(tmp_path)
    assert data_in(recipes, given) == "../data/a.jsonl"
    assert data_in(tmp_path / "recipe.toml", given) == "./data/a.jsonl"


def test_what_is_not_there_is_refused(tmp_path):
    recipe = tmp_path / "recipe.toml"
    with pytest.raises(DataError, match="there is no file"):
        data_in(recipe, tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="ending in .jsonl"):
        data_in(recipe, tmp_path / "data.txt")
    with pytest.raises(ModelError, match='no built-in model "builtin:maxi"; there is builtin:mini'):
        base_in(recipe, "builtin:maxi")
    with pytest.raises(ModelError, match="there is no folder"):
        base_in(recipe, "./gone")
    with pytest.raises(ModelError, match="found no config.json"):
        base_in(recipe, str(tmp_path))
    assert base_in(recipe, "someone/model") == "someone/model"


def test_files_that_are_there_stay_as_they_are(tmp_path):
    old, new = tmp_path / "old.toml", tmp_path / "data" / "new.jsonl"
    old.write_text("mine")
    with pytest.raises(InputError, match="old.toml already exists; --force replaces"):
        write_new({new: "x", old: "y"}, force=False)
    assert old.read_text() == "mine" and not new.exists()
    write_new({new: "x", old: "y"}, force=True)
    assert old.read_text() == "y" and new.read_text() == "x"


def test_a_format_that_the_backend_lacks_is_refused_with_those_it_has():
    bnb = registry.describe("bnb")
    assert choose_dtype(bnb, None) == "nf4" and choose_dtype(registry.describe("torchao"), None) == "int4"
    assert choose_dtype(registry.describe("mxfp4"), None) is None
    with pytest.raises(BackendError, match=r'"nf4", "fp4", "int8" .* found "nf5"; did you mean "nf4"\?'):
        choose_dtype(bnb, "nf5")
    with pytest.raises(BackendError, match='"mxfp4" has one format'):
        choose_dtype(registry.describe("mxfp4"), "nf4")


def test_options_without_documentation_cost_their_comments_only(tmp_path):
    options = attrs.make_class("Made", {"weight_dtype": attrs.field(type=str)}, kw_only=True)
    text = recipe_text(attrs.evolve(choice(), options=options), "recipe.toml")
    assert '\nweight_dtype = "nf4"\n' in text and loaded(tmp_path, text)
