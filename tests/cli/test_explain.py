"""`quantune explain`."""

import json

from commands import quantune_command, refused

from quantune.recipe.codes import CODES


def test_a_code_is_explained_with_an_example_and_its_correction():
    done = quantune_command("explain", "12")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("## QT012\n\nA key is unknown.\n")
    assert "rank = 8" in done.stdout and "Correct is:" in done.stdout and "r = 8" in done.stdout


def test_all_codes_are_listed():
    done = quantune_command("explain")
    assert done.returncode == 0 and all(name in done.stdout and CODES[name].title in done.stdout for name in CODES)


def test_codes_are_explained_in_json():
    one = json.loads(quantune_command("explain", "qt102", "--json").stdout)
    assert (one["code"], one["title"], one["note"]) == ("QT102", CODES["QT102"].title, None)
    assert [row["code"] for row in json.loads(quantune_command("explain", "--json").stdout)] == sorted(CODES)


def test_an_unknown_code_is_an_error_with_a_suggestion():
    assert 'there is no code "QT919"; did you mean' in refused("explain", "QT919")
