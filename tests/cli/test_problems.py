"""How a problem looks in a terminal."""

import attrs
import pytest
from rich.cells import cell_len

from quantune.cli.problems import render, visible
from quantune.errors import Place, Problem

PROBLEM = Problem(
    code="QT012",
    where="adapter.alpa",
    message='unknown key "alpa"',
    hint='did you mean "alpha"?',
    line=14,
    column=1,
    source_line="alpa = 32",
    underline=(1, 4),
    origin="recipe.toml",
)


def test_a_problem_shows_its_place_the_line_what_is_wrong_in_it_and_the_way_out():
    assert render(PROBLEM, 80).plain == (
        'recipe.toml:14:1 [adapter.alpa] unknown key "alpa"  QT012\n'
        "   14 | alpa = 32\n"
        "      | ^^^^\n"
        '      = did you mean "alpha"?'
    )


def test_a_problem_of_two_lines_shows_both():
    other = Place(line=3, column=1, source_line="load_in_4bit = true", underline=(1, 12), label="and this says nf4")
    shown = render(attrs.evolve(PROBLEM, related=(other,), hint=None), 80).plain
    assert shown.endswith("      | ^^^^\n    3 | load_in_4bit = true\n      | ------------ and this says nf4")


def test_a_second_place_on_the_command_line_is_named():
    other = Place(origin="--set adapter.r=4", label="this says 4")
    assert "      | --set adapter.r=4: this says 4" in render(attrs.evolve(PROBLEM, related=(other,)), 80).plain


def test_a_problem_without_a_line_is_one_line_and_its_hint():
    shown = render(attrs.evolve(PROBLEM, line=None, column=None, source_line=None, underline=None), 80).plain
    assert shown == 'recipe.toml [adapter.alpa] unknown key "alpa"  QT012\n      did you mean "alpha"?'


def test_one_place_of_a_line_gets_one_caret():
    assert "\n      | ^\n" in render(attrs.evolve(PROBLEM, underline=None), 80).plain


@pytest.mark.parametrize(
    ("line", "column", "length", "shown", "before", "under"),
    [
        ("r = 0", 5, 1, "r = 0", 4, 1),
        ("\tr = 0", 2, 1, "    r = 0", 4, 1),
        ("a\tr = 0", 3, 1, "a   r = 0", 4, 1),
        ("日本 = 0", 1, 2, "日本 = 0", 0, 4),
        ("日本 = 0", 6, 1, "日本 = 0", 7, 1),
        ("e\u0301 = 0", 6, 1, "e\u0301 = 0", 4, 1),
        ("a = \x1b[31m", 5, 5, "a = \\x1b[31m", 4, 8),
        ("a = \u202e", 5, 1, "a = \\u202e", 4, 6),
        ("a =", 4, 1, "a =", 3, 1),
        ("", 1, 1, "", 0, 1),
    ],
)
def test_the_caret_stands_under_what_is_wrong_whatever_stands_before_it(line, column, length, shown, before, under):
    assert visible(line, column, length, 80) == (shown, before, under)


@pytest.mark.parametrize("filler", ["x", "日", "\t"])
@pytest.mark.parametrize(("before", "length", "after"), [(0, 3, 500), (500, 3, 0), (500, 3, 500), (90, 500, 90)])
def test_a_long_line_is_cut_around_what_is_wrong(filler, before, length, after):
    line = filler * before + "!" * length + filler * after
    text, cells, under = visible(line, before + 1, length, 60)
    assert cell_len(text) <= 60
    assert text.startswith("…") == (before > 0) and text.endswith("…") == (after > 0)
    start = text.index("!")
    assert cells == cell_len(text[:start])
    assert text[start:].startswith("!" * (under - 1 if length > 60 else length))


def test_a_key_of_any_length_takes_no_more_than_a_few_lines():
    shown = render(attrs.evolve(PROBLEM, where=f"adapter.{'x' * 500}"), 80).plain
    assert f"[adapter.{'x' * 112}...]" in shown
