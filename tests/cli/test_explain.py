"""quantune explain, as a person runs it."""

import json

from commands import quantune_command, refused

from quantune.recipe.codes import CODES


def test_a_code_is_explained_with_an_example_and_how_it_is_put_right():
    told = quantune_command("explain", "qt012").stdout
    for part in (
        "QT012: A key is unknown.",
        "For example\n\n    [adapter]\n    rank = 8",
        "Put right\n\n    [adapter]\n    r = 8",
    ):
        assert part in told


def test_without_a_code_all_are_listed():
    lines = quantune_command("explain").stdout.splitlines()
    assert lines == [f"{code.name}  {code.title}" for code in CODES]


def test_json_holds_one_code_or_all_of_them():
    assert json.loads(quantune_command("explain", "12", "--json").stdout)["corrected"] == "[adapter]\nr = 8"
    assert [code["name"] for code in json.loads(quantune_command("explain", "--json").stdout)] == [
        c.name for c in CODES
    ]


def test_an_unknown_code_is_refused_with_the_one_that_is_meant():
    assert "did you mean QT012?" in refused("explain", "Q012")
