"""What a recipe may say: every error once, with its place; all of them at once."""

from __future__ import annotations

import itertools

import pytest

from quantune.backends.registry import options_of
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe

VALID = """\
[model]
base = "builtin:mini"

[quantization]
backend = "bnb"
weight_dtype = "nf4"

[adapter]
r = 8
targets = ["q_proj", "v_proj"]

[[data.train]]
path = "train.jsonl"
format = "chat"

[training]
max_steps = 10
learning_rate = 1e-3
"""


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def load(path, overrides=()):
    return load_recipe(path, options_of=options_of, overrides=overrides).recipe


def problems(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_valid_recipe_is_structured_with_defaults_and_backend_options(tmp_path):
    recipe = load(write(tmp_path, VALID))
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.adapter.alpha == 32.0 and isinstance(recipe.adapter.alpha, float)
    assert recipe.quantization.options.block_size == 64
    assert recipe.training.micro_batch_size == "auto"
    assert recipe.data.train[0].format == "chat"


def test_a_whole_number_is_fine_where_a_number_is_expected(tmp_path):
    assert load(write(tmp_path, VALID.replace("1e-3", "1"))).training.learning_rate == 1.0


CASES = [
    # old, new, code, line, where, message, hint
    ("[adapter]", "[adaptr]", "QT011", 8, "adaptr", 'unknown section "adaptr"', 'did you mean "adapter"?'),
    ("r = 8", "rank = 8", "QT012", 9, "adapter.rank", 'unknown key "rank"', "there are: alpha"),
    ("r = 8", "alpa = 8", "QT012", 9, "adapter.alpa", 'unknown key "alpa"', 'did you mean "alpha"?'),
    (
        'weight_dtype = "nf4"',
        "blok_size = 64",
        "QT012",
        6,
        "quantization.blok_size",
        'unknown key "blok_size" for backend "bnb"',
        'did you mean "block_size"?',
    ),
    ("r = 8", "r = true", "QT013", 9, "adapter.r", "expected a whole number, found true (a boolean)", None),
    ("r = 8", "r = 8.0", "QT013", 9, "adapter.r", "expected a whole number, found 8.0 (a number)", None),
    ("r = 8", 'r = "8"', "QT013", 9, "adapter.r", 'expected a whole number, found "8" (a string)', None),
    ("1e-3", '"1e-3"', "QT013", 18, "training.learning_rate", 'expected a number, found "1e-3" (a string)', None),
    ('"builtin:mini"', "3", "QT013", 2, "model.base", "expected a string, found 3 (a whole number)", None),
    ('["q_proj", "v_proj"]', "7", "QT013", 10, "adapter.targets", "expected a string or a list of strings", None),
    (
        '["q_proj", "v_proj"]',
        '["q_proj", 7]',
        "QT013",
        10,
        "adapter.targets[1]",
        "expected a string, found 7",
        None,
    ),
    ("r = 8", 'use_dora = "false"', "QT013", 9, "adapter.use_dora", 'expected true or false, found "false"', None),
    ('"chat"', '"chatt"', "QT013", 14, "data.train[0].format", 'one of "chat", "instruct", "completion"', None),
    ('"nf4"', '"nf5"', "QT013", 6, "quantization.weight_dtype", '(did you mean "nf4"?)', None),
    ("[model]\n", "adapter = 3\n[model]\n", "QT002", 9, "recipe", "not valid TOML", None),
    ("r = 8", "r = 0", "QT014", 9, "adapter.r", "must be greater than 0, found 0", None),
    ("r = 8", "r = -8", "QT014", 9, "adapter.r", "must be greater than 0, found -8", None),
    ("r = 8", "dropout = 1.0", "QT014", 9, "adapter.dropout", "at least 0 and less than 1, found 1.0", None),
    ("1e-3", "nan", "QT014", 18, "training.learning_rate", "must be greater than 0, found nan", None),
    ("max_steps = 10", "seed = -1", "QT014", 17, "training.seed", "must be at least 0, found -1", None),
    ('"builtin:mini"', '""', "QT014", 2, "model.base", "must not be empty", None),
    ("max_steps = 10", "checkpoint.keep = 1", "QT012", 17, "training.checkpoint", 'unknown key "checkpoint"', None),
    ('base = "builtin:mini"\n', "", "QT010", 1, "model.base", '[model] lacks the key "base"', None),
    ('[model]\nbase = "builtin:mini"\n', "", "QT010", None, "model", 'the recipe lacks the section "model"', None),
    ('format = "chat"', "", "QT010", 12, "data.train[0].format", '[data.train[0]] lacks the key "format"', None),
    ('backend = "bnb"', 'backend = "bnbb"', "QT015", 5, "quantization.backend", 'found "bnbb"', None),
    ('backend = "bnb"', 'backend = "hqq"', "QT015", 5, "quantization.backend", "pip install quantune-hqq", None),
    ('"nf4"', '"nf4"\nblock_size = 48', "QT016", 7, "quantization.block_size", "expected one of 32, 64", None),
    ('"nf4"', '"int8"\nblock_size = 64', "QT016", 7, "quantization.block_size", "block_size has no meaning", None),
    ('"nf4"', '"nf4"\noptions = 1', "QT012", 7, "quantization.options", 'unknown key "options"', None),
]


@pytest.mark.parametrize(("old", "new", "code", "line", "where", "message", "hint"), CASES)
def test_every_error_names_its_place_what_was_expected_and_what_to_do(
    tmp_path, old, new, code, line, where, message, hint
):
    text = VALID.replace(old, new, 1)
    assert text != VALID
    found = {problem.where: problem for problem in problems(write(tmp_path, text))}
    problem = found[where]
    assert problem.code == code
    assert problem.line == line
    assert message in problem.message
    assert hint is None or hint in problem.hint
    if line is not None:
        assert problem.source_line == text.splitlines()[line - 1]
        assert problem.origin.endswith("recipe.toml")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        VALID.replace("r = 8", "r = 0\nalpa = 3")
        .replace('"nf4"', '"nf5"')
        .replace("1e-3", "-1")
        .replace('"chat"', '"chatt"')
    )
    found = problems(write(tmp_path, text))
    assert [problem.where for problem in found] == [
        "quantization.weight_dtype",
        "adapter.r",
        "adapter.alpa",
        "data.train[0].format",
        "training.learning_rate",
    ]
    assert [problem.line for problem in found] == sorted(problem.line for problem in found)


def test_any_order_of_the_tables_gives_the_same_problems(tmp_path):
    tables = ["[" + table for table in VALID.replace("r = 8", "r = 0").replace('"nf4"', '"nf5"').split("\n[")]
    tables[0] = tables[0][1:]
    found = {
        tuple(sorted((p.where, p.message) for p in problems(write(tmp_path, "\n".join(order)))))
        for order in itertools.permutations(tables)
    }
    assert len(found) == 1


def test_a_missing_file_suggests_one_that_is_there(tmp_path):
    write(tmp_path, VALID)
    (problem,) = problems(tmp_path / "recpe.toml")
    assert problem.code == "QT001" and "no such file" in problem.message and "recipe.toml" in problem.hint


def test_a_folder_is_no_recipe(tmp_path):
    assert "found a folder" in problems(tmp_path)[0].message


def test_text_that_is_not_utf8_says_where(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"[model]\nbase = '\xff'")
    assert "position 16" in problems(path)[0].message


def test_invalid_toml_names_the_line(tmp_path):
    (problem,) = problems(write(tmp_path, VALID.replace("r = 8", "r == 8")))
    assert (problem.code, problem.line) == ("QT002", 9) and problem.source_line == "r == 8"


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("training.max_steps=3", lambda r: r.training.max_steps, 3),
        ("adapter.targets=all-linear", lambda r: r.adapter.targets, "all-linear"),
        ('adapter.targets=["k_proj"]', lambda r: r.adapter.targets, ("k_proj",)),
        ("data.train[0].limit=5", lambda r: r.data.train[0].limit, 5),
        ("data.train.0.limit=5", lambda r: r.data.train[0].limit, 5),
        ("evaluation.at_end=false", lambda r: r.evaluation.at_end, False),
        ("output.dir=/tmp/a b", lambda r: r.output.dir, "/tmp/a b"),
    ],
)
def test_set_overrides_a_key(tmp_path, override, get, value):
    assert get(load(write(tmp_path, VALID), [override])) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=3.5", "expected a whole number, found 3.5"),
        ("adapter.r=0", "must be greater than 0"),
        ("adapter.alpa=3", 'unknown key "alpa"'),
        ("adapter", "expected section.key=value"),
        ("data.train[4].limit=3", "is no place in this recipe"),
    ],
)
def test_a_wrong_override_is_named_as_one(tmp_path, override, message):
    (problem,) = problems(write(tmp_path, VALID), [override])
    assert message in problem.message
    assert problem.origin == f"--set {override}" and problem.line is None
