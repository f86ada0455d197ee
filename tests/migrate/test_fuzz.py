"""A few thousand of the documents that `fuzz.py` makes, and those that were trouble once."""

from __future__ import annotations

import random

import documents
import fuzz
import pytest
from migration import migrate


@pytest.mark.parametrize("part", range(5))
def test_no_document_makes_a_traceback_or_loses_a_key(part):
    found, failures = fuzz.fuzz(360, seed=f"test {part}")
    assert not failures, failures[0]
    assert found["axolotl"] > 50 and found["unreadable"] > 50 and found["recipe refused"] > 30


@pytest.mark.parametrize("kind", range(len(documents.HOSTILE)))
def test_hostile_documents_are_refused_or_read(kind):
    """And soon: what grows without bound there would not end."""
    for seed in range(2):
        fuzz.check_yaml(documents.HOSTILE[kind](random.Random(seed)))


def test_a_list_where_the_arguments_of_a_format_are_expected_is_refused():
    text = "base_model: x\nmodel_quantization_config: FineGrainedFP8Config\n"
    fuzz.check_yaml(text + "model_quantization_config_kwargs:\n  weight_block_size: [[{a: 1}], 2]\n")


LARGE = {
    "keys": "".join(f"k{n}: {n}\n" for n in range(20_000)),
    "the same key": "a: 1\n" * 5_000,
    "keys of a free table": "base_model: x\nmodel_config:\n" + "".join(f"  k{n}: 1\n" for n in range(20_000)),
    "datasets": "datasets:\n" + "".join(f"- {{path: a{n}.jsonl, type: alpaca}}\n" for n in range(500)),
    "one text": "a: " + "x" * 1_000_000,
    "comments": "# x\n" * 20_000,
    "brackets": "[" * 500_000,
    "more than a mebibyte": "a: " + "x" * (1 << 20),
    "aliases of aliases": documents.bomb(40),
    "merges of merges": documents.merge_bomb(40),
}


@pytest.mark.parametrize("of", LARGE)
def test_a_large_document_is_accounted_for_or_refused(of):
    """What is quadratic in their size would take minutes."""
    report = migrate(LARGE[of]).report
    assert report.entries or report.kind == "unreadable"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a: "\\U00110000"', "a character beyond U+10FFFF"),
        ('a: "\\uD800"', "half of a character"),
        ("lora_r: 0x" + "f" * 4000, "a value of the kind int"),
        ("lora_r: " + "9" * 5000, "a value of the kind int"),
        ("a: 2024-13-45", "a value of the kind timestamp"),
        ("a: !!python/object/apply:os.system [id]", "tags that make objects"),
        ("a: &a [*a]", "an alias stands inside what it stands for"),
        ("? [a]\n: 1", "a name or a number as a key"),
        ("a: \x07", "the character U+0007"),
        ("- a", "found a list"),
        ("!!set {a, b}", "found a set"),
    ],
)  # fmt: skip
def test_what_is_no_usable_yaml_is_said_in_a_sentence(text, message):
    migration = migrate(text)
    assert migration.report.kind == "unreadable" and not migration.report.ok
    assert message in migration.report.problems[0].message


def test_keys_below_an_empty_key_are_not_those_at_the_top():
    report = migrate("base_model: x\n? ''\n: {base_model: y, rl: dpo}\n").report
    assert [(entry.key, entry.outcome) for entry in report.entries[1:]] == [
        (".base_model", "unrecognised"),
        (".rl", "unrecognised"),
    ]


@pytest.mark.parametrize(
    "text", ["nan", "inf", "9" * 5000, "[" * 500, '"\\ud800"', "1e999", "a = {b = 1", "\x00", "\ufeff"]
)
def test_a_recipe_with_an_odd_value_is_refused_in_a_sentence(text):
    for recipe in fuzz.RECIPES:
        for line in recipe.splitlines():
            assert fuzz.check_toml(recipe.replace(line, f"{line.partition('=')[0]}= {text}"))
        assert fuzz.check_toml(f"{text}\n{recipe}")
