"""Realistic YAMLs, and what must become of them: `corpus/NAME.yaml` beside `corpus/NAME.toml`.

The expectations were written from what the keys mean, not from what `migrate` makes of them:

- `ok`, `kind`: as the report says.
- `refused`, `unrecognised`, `problems`: all of them, no more. `unrecognised` gives the key that is suggested, "*" for
  whatever. `problems` gives where each stands. With `lenient` there may be more problems.
- `refused_among`: some of these are refused, nothing else is.
- `default`, `dropped`, `changed`: some of those that are.
- `notes`: words that the note of a key must have.
- `absent`: keys that the recipe must not have.
- `files`: data that the YAML names, so that the recipe can be checked.
- `recipe`: values of the recipe, "none" where it has none. Of a YAML that is not ok, they are those of the document
  that --force writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest
import tomli
import yaml
from migration import migrate
from walker import keys_of, loaded

from quantune.backends import registry
from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import check_files
from quantune.recipe.resolve import with_absolute_paths

CORPUS = Path(__file__).parent / "corpus"
NAMES = sorted(path.stem for path in CORPUS.glob("*.yaml"))
WORKLIST = (CORPUS / "worklist.txt").read_text().split()
OUTCOMES = ("translated", "default", "dropped", "refused", "unrecognised")

every_yaml = pytest.mark.parametrize("name", NAMES)


def text_of(name):
    return (CORPUS / f"{name}.yaml").read_text()


def expected_of(name):
    return tomli.loads((CORPUS / f"{name}.toml").read_text())


def entries_of(report, *outcomes):
    return {entry.key: entry for entry in report.entries if entry.outcome in outcomes}


def written_recipe(name, folder, migration):
    """The recipe in a file, with the data it names beside it."""
    for file in expected_of(name).get("files", ()):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}\n")
    path = folder / f"{name}.toml"
    path.write_text(migration.recipe, encoding="utf-8")
    return path


def value_at(recipe, path):
    """The value at `data.train[0].path` in nested tables; "none" where there is none."""
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(recipe, dict):
            recipe = recipe.get(step)
        elif recipe is not None:
            recipe = recipe[int(step)]
    if isinstance(recipe, tuple):
        recipe = list(recipe)
    return "none" if recipe is None else recipe


def as_tables(value):
    """A recipe's classes as nested tables."""
    if attrs.has(type(value)):
        return {field.name: as_tables(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {key: as_tables(member) for key, member in value.items()}
    return [as_tables(member) for member in value] if isinstance(value, list | tuple) else value


@every_yaml
def test_every_key_is_accounted_for_once(name):
    migration = migrate(text_of(name), name=f"{name}.yaml")
    if migration.report.kind == "unreadable":
        assert migration.report.entries == ()
        return
    assert sorted(entry.key for entry in migration.report.entries) == keys_of(loaded(text_of(name)))


@every_yaml
def test_the_report_says_what_the_keys_mean(name):
    expected, report = expected_of(name), migrate(text_of(name), name=f"{name}.yaml").report
    refused = set(entries_of(report, "refused"))
    unrecognised = entries_of(report, "unrecognised")
    assert (report.kind, report.ok) == (expected.get("kind", "axolotl"), expected["ok"]), report.problems
    if report.kind in ("llamafactory", "torchtune"):
        assert {entry.outcome for entry in report.entries} == {"refused"}
        assert len({entry.note for entry in report.entries}) == 1
    elif "refused_among" in expected:
        assert refused and refused <= {*expected["refused_among"], *expected.get("refused", ())}
    else:
        assert refused == set(expected.get("refused", ()))
    assert set(unrecognised) == set(expected.get("unrecognised", {}))
    for key, meant in expected.get("unrecognised", {}).items():
        assert meant == "*" or f'"{meant}"' in unrecognised[key].note
    for outcome in ("default", "dropped"):
        assert set(expected.get(outcome, ())) <= set(entries_of(report, outcome))
    changed = {entry.key for entry in report.entries if entry.changed}
    assert set(expected.get("changed", ())) <= changed
    notes = {entry.key: entry.note for entry in report.entries}
    for key, words in expected.get("notes", {}).items():
        assert words in notes[key]
    wheres = {problem.where for problem in report.problems}
    assert set(expected.get("problems", ())) <= wheres
    if not expected.get("lenient"):
        assert wheres == set(expected.get("problems", ())), report.problems


@every_yaml
def test_whatever_is_refused_dropped_or_changed_says_why(name):
    for entry in migrate(text_of(name)).report.entries:
        if entry.changed or entry.outcome in ("dropped", "refused"):
            assert entry.note
        assert bool(entry.to) <= (entry.outcome == "translated")
        assert entry.outcome in OUTCOMES


@every_yaml
def test_an_entry_points_at_its_key(name):
    text = text_of(name)
    lines = text.splitlines()
    for entry in migrate(text).report.entries:
        key = re.split(r"[.\[]", entry.key)[-1]
        found = lines[entry.line - 1][entry.column - 1 :]
        assert found.strip("\"'- ").startswith(key) or key.endswith("]"), entry


@every_yaml
def test_the_recipe_checks_and_says_what_the_yaml_said(name, tmp_path):
    expected, migration = expected_of(name), migrate(text_of(name))
    if migration.recipe is None:
        assert "recipe" not in expected and migration.document is None
        return
    if not expected["ok"]:
        for path, value in expected.get("recipe", {}).items():
            assert value_at(migration.document, path) == value, path
        return
    recipe = load_recipe(written_recipe(name, tmp_path, migration), options_of=registry.options_of)
    assert recipe.warnings == ()
    tables = as_tables(recipe.recipe)
    for path, value in expected["recipe"].items():
        assert value_at(tables, path) == value, path
    for path in expected.get("absent", ()):
        assert value_at(migration.document, path) == "none", path
    assert tomli.loads(migration.recipe) == migration.document


@every_yaml
def test_the_files_that_the_recipe_names_are_those_of_the_yaml(name, tmp_path):
    expected, migration = expected_of(name), migrate(text_of(name))
    if not expected["ok"]:
        return
    path = written_recipe(name, tmp_path, migration)
    loaded_recipe = load_recipe(path, options_of=registry.options_of)
    try:
        check_files(loaded_recipe, with_absolute_paths(loaded_recipe.recipe, path))
    except RecipeError as error:  # folders of models and adapters, which no test brings
        assert {problem.where for problem in error.problems} <= {"model.base", "adapter.start_from"}


@every_yaml
def test_migrating_twice_gives_the_same_bytes(name):
    first, second = (migrate(text_of(name), name=f"{name}.yaml") for _ in range(2))
    assert first == second
    assert json.dumps(first.report.as_dict()) == json.dumps(second.report.as_dict())


@every_yaml
def test_what_is_dropped_says_nothing_that_the_recipe_could(name):
    migration = migrate(text_of(name))
    if migration.document is None:
        return
    read = loaded(text_of(name))
    without = {key: value for key, value in read.items() if key not in entries_of(migration.report, "dropped")}
    assert migrate(yaml.safe_dump(without, sort_keys=False)).document == migration.document


def test_a_recipe_that_lacks_something_names_it_at_its_head():
    for name in NAMES:
        migration = migrate(text_of(name))
        if migration.recipe is not None:
            head = migration.recipe.split("\n\n[")[0].replace("\n#  ", "")
            assert all(key in head for key in entries_of(migration.report, "refused", "unrecognised"))


def test_every_key_of_the_worklist_stands_in_some_yaml():
    found = {re.sub(r"\[\d+\]", "[]", key) for name in NAMES if kind_of(name) == "axolotl" for key in keys(name)}
    missing = [key for key in WORKLIST if not any(re.match(rf"{re.escape(key)}(\.|\[|$)", one) for one in found)]
    assert missing == []


def kind_of(name):
    return expected_of(name).get("kind", "axolotl")


def keys(name):
    return keys_of(loaded(text_of(name)))
