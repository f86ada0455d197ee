"""Whatever a YAML holds, the report has each of its keys exactly once, and the order of keys means nothing."""

from __future__ import annotations

import random

import documents
import pytest
import yaml
from migration import migrate
from walker import keys_of

from quantune.recipe.migrate import leaf_keys

SEEDS = range(100)


def outcomes(migration):
    """The entries without their positions, and the problems likewise."""
    entries = {
        (entry.key, repr(entry.value), entry.outcome, tuple(sorted(entry.to)), entry.note, entry.changed)
        for entry in migration.report.entries
    }
    problems = sorted((problem.code, problem.where, problem.message) for problem in migration.report.problems)
    return entries, problems


@pytest.mark.parametrize("seed", SEEDS)
def test_the_keys_of_the_report_are_those_of_the_document(seed):
    text = documents.dump(documents.structure(random.Random(seed)))
    read = yaml.safe_load(text)
    report = migrate(text).report
    assert report.kind != "unreadable", report.problems
    assert sorted(entry.key for entry in report.entries) == keys_of(read) == sorted(leaf_keys(read))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_keys_means_nothing(seed):
    chance = random.Random(seed)
    document = documents.structure(chance)
    one = migrate(documents.dump(document))
    other = migrate(documents.dump(documents.shuffled(document, chance)))
    assert outcomes(one) == outcomes(other)
    assert repr_of(one.document) == repr_of(other.document)


def repr_of(document):
    """A document for comparison: the order of keys is left out, and NaN equals itself."""
    if isinstance(document, dict):
        return sorted((repr(key), repr_of(member)) for key, member in document.items())
    return [repr_of(member) for member in document] if isinstance(document, list) else repr(document)


def test_an_alias_counts_wherever_it_stands():
    text = "base_model: x\nfsdp_config: &c {a: 1, b: [2, 3]}\nfsdp: [*c, *c]\n"
    found = sorted(entry.key for entry in migrate(text).report.entries)
    assert found == ["base_model", "fsdp[0].a", "fsdp[0].b", "fsdp[1].a", "fsdp[1].b", "fsdp_config.a", "fsdp_config.b"]


def test_merged_keys_stand_where_they_are_merged_and_the_own_ones_win():
    text = "a: &a {path: one, type: alpaca}\ndatasets:\n- <<: *a\n  path: two\n- <<: [*a]\n"
    values = {entry.key: entry.value for entry in migrate(text).report.entries}
    assert values == {
        "a.path": "one",
        "a.type": "alpaca",
        "datasets[0].path": "two",
        "datasets[0].type": "alpaca",
        "datasets[1].path": "one",
        "datasets[1].type": "alpaca",
    }


@pytest.mark.parametrize("key", ["0", "true", "null", "1.5", "2026-01-02", "~", "a.b", "a[0]", "''", "!!binary aGk="])
def test_a_key_that_is_no_name_is_unrecognised(key):
    report = migrate(f"base_model: x\n{key}: 1\n").report
    assert [entry.outcome for entry in report.entries if entry.key != "base_model"] == ["unrecognised"]


def test_a_key_with_a_dot_is_not_taken_for_the_one_below():
    entries = migrate('base_model: x\n"fsdp_config.version": 2\n"special_tokens.pad_token": y\n').report.entries
    assert [entry.outcome for entry in entries] == ["translated", "unrecognised", "unrecognised"]


def test_values_are_those_that_the_safe_loader_reads():
    for seed in range(40):
        text = documents.dump(documents.structure(random.Random(f"values {seed}")))
        read = yaml.safe_load(text)
        for entry in migrate(text).report.entries:
            if entry.key in read and not isinstance(read[entry.key], dict):
                assert repr(entry.value) == repr(read[entry.key])
