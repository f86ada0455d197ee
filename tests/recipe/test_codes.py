"""Every code is told with an example that has it, and that is put right."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tomli
import tomlkit
import yaml

import quantune
from quantune.backends.checkpoints import format_problem
from quantune.backends.registry import backends_with_option, options_of
from quantune.errors import InputError, RecipeError
from quantune.recipe.codes import CODES, WHOLE_YAML, find_code
from quantune.recipe.load import load_recipe
from quantune.recipe.migrate import migrate
from quantune.recipe.preflight import check_files
from quantune.recipe.reference import render_codes
from quantune.recipe.resolve import with_absolute_paths

ROOT = Path(__file__).parents[2]
BASE = {
    "model": {"base": "builtin:mini"},
    "adapter": {},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a valid recipe, its data, and what examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(BASE))
    quantized = {
        "llama-awq": {"quant_method": "awq"},
        "llama-fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    for name, stored in {"llama": None, **quantized}.items():
        model = tmp_path / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"quantization_config": stored}))
        (model / "model.safetensors").touch()
    return tmp_path


def merged(base, snippet):
    """The snippet's keys in place of the base's, tables merged."""
    both = {
        key: merged(base[key], value)
        for key, value in snippet.items()
        if isinstance(base.get(key), dict) and isinstance(value, dict)
    }
    return {**base, **snippet, **both}


def whole(snippet):
    """A recipe around a snippet; one with a base and data is whole by itself, and what is no TOML stays as it is."""
    try:
        parsed = tomli.loads(snippet)
    except tomli.TOMLDecodeError:
        return snippet
    return snippet if {"model", "data"} <= parsed.keys() else tomlkit.dumps(merged(BASE, parsed))


def whole_yaml(snippet):
    """A YAML around a snippet, whose keys take the place of the whole one's; another tool's stays as it is."""
    keys = {key.value for key, _ in yaml.compose(snippet).value}
    rest = {key: value for key, value in yaml.safe_load(WHOLE_YAML).items() if key not in keys}
    return snippet if "model_name_or_path" in keys or not rest else f"{snippet}\n{yaml.safe_dump(rest)}"


def codes_found(example, folder):
    """The codes of everything that `quantune check` says of an example, `migrate` of a YAML."""
    if example.startswith("# old.yaml"):
        return {problem.code for problem in migrate(whole_yaml(example), name="old.yaml").report.problems}
    arguments = shlex.split(example.removeprefix("$ quantune check ")) if example.startswith("$") else ["example.toml"]
    if not example.startswith("$"):
        (folder / "example.toml").write_text(whole(example))
    path = Path(arguments[0])
    overrides = [value for flag, value in zip(arguments, arguments[1:], strict=False) if flag == "--set"]
    try:
        loaded = load_recipe(path, options_of=options_of, backends_with=backends_with_option, overrides=overrides)
        check_files(loaded, with_absolute_paths(loaded.recipe, path), format_problem=format_problem)
    except RecipeError as error:
        return {problem.code for problem in error.problems}
    return {warning.code for warning in loaded.warnings}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_an_example_has_the_problem_and_no_other(code, folder):
    assert codes_found(code.example, folder) == {code.name}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_a_corrected_example_has_no_problem(code, folder):
    assert codes_found(code.corrected, folder) == set()


def test_every_code_that_is_raised_is_told_and_every_code_told_is_raised():
    sources = Path(quantune.__file__).parent.rglob("*.py")
    texts = [path.read_text() for path in sources if path.name != "codes.py"]
    assert {name for text in texts for name in re.findall(r'"(QT\d{3})"', text)} == {code.name for code in CODES}


def test_codes_are_sorted_and_told_in_sentences():
    assert [code.name for code in CODES] == sorted({code.name for code in CODES})
    for code in CODES:
        assert code.title.endswith(".") and 2 <= len(re.findall(r"[.!](?:\s|$)", code.explanation)) <= 6, code.name


def test_an_example_shows_the_keys_concerned_and_not_much_else():
    for code in CODES:
        assert len(code.example.splitlines()) <= 10, code.name


@pytest.mark.parametrize("name", ["QT012", "qt012", " 12 ", "QT12"])
def test_a_code_is_found_however_it_is_written(name):
    assert find_code(name).name == "QT012"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Q012", "did you mean QT012?"),
        ("QT999", "quantune explain lists them"),
        ("adapter", "lists them"),
        ("", "lists them"),
    ],
)
def test_an_unknown_code_is_answered_with_the_nearest_or_the_list(name, hint):
    with pytest.raises(InputError, match=re.escape(hint)):
        find_code(name)


def test_the_page_of_errors_in_docs_is_up_to_date():
    assert (ROOT / "docs" / "errors.md").read_text() == render_codes(), "run `make docs`"
