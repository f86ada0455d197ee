"""Every code has an explanation, and its examples are what they say."""

import re
from pathlib import Path

import pytest
import tomli
import tomlkit

from quantune.backends.registry import backends_with_option, options_of
from quantune.errors import InputError, RecipeError
from quantune.recipe import codes
from quantune.recipe.codes import CODES
from quantune.recipe.explanations import find, page
from quantune.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
AROUND = {
    "model": {"base": "builtin:mini"},
    "adapter": {},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}
WITH_EXAMPLE = [name for name, code in CODES.items() if code.example is not None]


def codes_of(tmp_path, snippet, *, whole=False):
    """The codes of what is found in a recipe that has these lines; the tables they lack are as above."""
    try:
        document = tomli.loads(snippet)
    except tomli.TOMLDecodeError:
        text = snippet
    else:
        around = {} if whole else {key: table for key, table in AROUND.items() if key not in document}
        if "data" in document and not whole:
            document["data"] = {**AROUND["data"], **document["data"]}
        text = tomlkit.dumps({**document, **around})
    (tmp_path / "recipe.toml").write_text(text)
    try:
        loaded = load_recipe(tmp_path / "recipe.toml", options_of=options_of, backends_with=backends_with_option)
    except RecipeError as error:
        return [problem.code for problem in error.problems]
    return [warning.code for warning in loaded.warnings]


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_an_example_causes_exactly_its_code_and_the_corrected_one_nothing(tmp_path, name):
    whole = name == "QT120"
    assert codes_of(tmp_path, CODES[name].example, whole=whole) == [name]
    assert codes_of(tmp_path, CODES[name].corrected, whole=whole) == []


@pytest.mark.parametrize("name", CODES)
def test_every_code_is_explained_with_an_example_or_a_note(name):
    code = CODES[name]
    assert re.fullmatch(r"QT\d{3}", name)
    assert code.title.endswith(".") and 1 <= len(re.findall(r"[.](?: |$)", code.explanation)) <= 6
    assert (code.example is None) == (code.corrected is None)
    assert code.example is not None or code.note is not None


def test_every_code_that_is_raised_is_explained_and_the_other_way_round():
    package = Path(codes.__file__).parents[1]
    sources = [path for path in package.rglob("*.py") if path != Path(codes.__file__)]
    raised = {code for path in sources for code in re.findall(r'"(QT\d{3})"', path.read_text(encoding="utf-8"))}
    assert raised == set(CODES)


@pytest.mark.parametrize("written", ["QT012", "qt012", "12", "012", "QT12", " Qt012 "])
def test_a_code_is_found_however_it_is_written(written):
    assert find(written)[0] == "QT012"


@pytest.mark.parametrize(
    ("written", "suggestion"),
    [("QT919", "did you mean"), ("QTO12", 'did you mean "QT012"?'), ("nonsense", "quantune explain lists them all")],
)
def test_an_unknown_code_is_answered_with_one_that_may_be_meant(written, suggestion):
    with pytest.raises(InputError, match=re.escape(suggestion)):
        find(written)


def test_the_page_in_docs_is_up_to_date():
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page(), "run `make docs`"
