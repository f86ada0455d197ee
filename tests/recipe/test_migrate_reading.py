"""YAML is read as PyYAML's safe loader reads it, with positions, and within limits."""

import datetime

import pytest
import yaml

from quantune.recipe.migrate import leaf_keys
from quantune.recipe.migrate.reading import Unreadable, key_text, read


def unreadable(text):
    with pytest.raises(Unreadable) as caught:
        read(text)
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        "rate: 2e-5\nother: 2.0e-5",
        "a: no\nb: off\nc: Yes\nd: 'no'",
        "time: 1:30\noctal: 010\nhex: 0x1F\nunder: 1_000",
        "a:\nb: ~\nc: null\nd: ''",
        "day: 2024-01-31\nwhen: 2024-01-31T10:00:00Z",
        "base: &base {x: 1, y: 2}\nuse: {<<: *base, y: 3}\nboth: {<<: [*base, {z: 4}]}",
        "a: &a [1, 2]\nb: *a\nc: [*a, *a]",
        "text: |\n  one\n  two\nfolded: >\n  one\n  two",
        "1: one\ntrue: yes\nnull: none\n1.5: x",
        "tokens: !!set {a, b}\npairs: !!omap [a: 1]\nbinary: !!binary aGVsbG8=",
        '"quoted\\u0020key": "\\x41"',
        "big: .inf\nnot: .nan",
    ],
)
def test_values_are_what_the_safe_loader_makes_of_them(text):
    assert str(read(text).values) == str(yaml.safe_load(text))


def test_a_learning_rate_without_a_dot_is_text_and_a_bare_no_is_false():
    assert read("a: 2e-5\nb: no\nc: 1:30\nd: 2024-01-31").values == {
        "a": "2e-5",
        "b": False,
        "c": 90,
        "d": datetime.date(2024, 1, 31),
    }


def test_every_key_knows_where_it_stands():
    text = "# a comment\nbase: x\nlist:\n  - path: a\n    'type': b\n  - {path: c, type: {d: e}}\n"
    places = {key_text(path): place for path, place in read(text).positions.items()}
    assert places == {
        "base": (2, 1),
        "list": (3, 1),
        "list[0]": (4, 5),
        "list[0].path": (4, 5),
        "list[0].type": (5, 5),
        "list[1]": (6, 5),
        "list[1].path": (6, 6),
        "list[1].type": (6, 15),
        "list[1].type.d": (6, 22),
    }


def test_a_merged_key_stands_where_it_was_written():
    document = read("base: &base\n  r: 8\nadapter:\n  <<: *base\n  alpha: 16\n")
    assert document.values["adapter"] == {"r": 8, "alpha": 16}
    assert document.positions["adapter", "r"] == (2, 3)
    assert document.positions["adapter", "alpha"] == (5, 3)


def test_a_key_that_stands_twice_is_reported_with_both_places():
    document = read("a: 1\nb: {c: 1, c: 2}\na: 2\n")
    assert document.values == {"a": 2, "b": {"c": 2}}
    assert sorted(document.duplicates) == [(("a",), (1, 1), (3, 1)), (("b", "c"), (2, 5), (2, 11))]


def test_what_a_merge_brings_is_no_duplicate_however_often_it_is_used():
    text = "base: &base {a: 1}\none: &one {<<: *base, a: 2}\ntwo: *one\nthree: {<<: *one, a: 3}\n"
    assert read(text).duplicates == ()


def test_leaves_are_scalars_empty_tables_and_lists_without_tables():
    document = yaml.safe_load(
        "a: 1\nb:\nc: {}\nd: []\ne: [1, [2, 3]]\nf:\n  - {g: 1}\n  - {}\n  - 2\n  - [{h: 1}]\ni: {j: {k: [l]}}\n"
    )
    assert leaf_keys(document) == [
        *("a", "b", "c", "d", "e"),
        *("f[0].g", "f[1]", "f[2]", "f[3][0].h"),
        "i.j.k",
    ]
    assert leaf_keys({}) == []


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        ("a: [1\nb: 2", (2, 2), "expected"),
        ("a: 1\n\tb: 2", (2, 1), "cannot start any token"),
        ("a: *nobody", (1, 4), "undefined alias"),
        ("- a\n- b", None, "expected keys with values, found a list"),
        ("just text", None, "found a single value"),
        ("", None, "found nothing"),
        ("a: 1\n---\nb: 2", (2, 1), "another document"),
        ("a: !!python/object/apply:os.system [ls]", (1, 4), "tags that make objects are not read"),
        ("b: 1\na: !thing 1", (2, 4), "tags that make objects are not read"),
        ("a: 1\nb: 2024-13-45", (2, 4), "expected a value of the kind timestamp"),
        ("a: !!int x", (1, 4), "expected a value of the kind int"),
        ("a: !!bool maybe", (1, 4), "expected a value of the kind bool"),
        ("? [a, b]\n: 1", (1, 3), "expected a name or a number as a key"),
        ("a: &a [*a]", (1, 4), "an alias stands inside what it stands for"),
        ("a: &a {<<: *a}", (1, 4), "an alias stands inside what it stands for"),
        ('a: "\\ud83d"', (1, 4), "found half of a character"),
        ("a: b\x07", None, "found the character U+0007"),
        ("a: " + "[" * 200, (1, 103), "nested more than 100 levels deep"),
        ("a: " + "x" * (1 << 20), None, "expected at most 1 MiB"),
    ],
    ids=range(19),
)
def test_what_can_not_be_read_is_said_in_a_sentence_with_its_place(text, place, part):
    error = unreadable(text)
    assert part in error.message
    assert error.position == place


def test_aliases_are_counted_as_often_as_they_are_used():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "expected at most 100,000 values" in unreadable("\n".join(lines)).message
    assert len(read("\n".join(lines[:4])).values["a3"]) == 10
