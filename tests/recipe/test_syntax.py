"""What is said of a text that is not TOML."""

import random

import pytest
import tomli
from recipe_support import VALID, options_of, problems, write
from toml_documents import Document

from quantune.errors import RecipeError
from quantune.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        ("backend = bnb # x", (1, 11, 3), "expected a value, found bnb", 'text stands in quotes: "bnb"'),
        ("x = [1,\n  a, 2]", (2, 3, 1), "expected a value, found a", 'text stands in quotes: "a"'),
        ("compile = True", (1, 11, 4), "expected a value, found True", "write true"),
        ("limit = null", (1, 9, 4), "expected a value, found null", "TOML has no null: leave the key out"),
        ("dropout = .5", (1, 11, 2), "expected a value, found .5", "a number has digits on both sides of its point"),
        ("r =", (1, 4, 1), "expected a value, found nothing", None),
        ("r: 16", (1, 2, 1), 'expected = after the key, found ":"', "a key and its value are written as key = value"),
        ("r", (1, 2, 1), "expected = after the key, found nothing", "a key and its value are written as key = value"),
        ('x = "abc', (1, 9, 1), "the string does not end on its line", "close it with the quote that it begins with"),
        ("r = 1 s = 2", (1, 7, 5), 'expected the end of the line, found "s = 2"', None),
        ("x = [1, 2", (2, 1, 1), "unclosed array", None),
        (r'x = "C:\users"', (1, 10, 1), "invalid hex value", "in single quotes a backslash is a backslash"),
        (r'x = "C:\models"', (1, 10, 1), "unescaped '\\' in a string", "in single quotes a backslash is a backslash"),
    ],
)
def test_the_piece_of_text_is_named_with_what_to_write(tmp_path, text, place, message, hint):
    (problem,) = problems(write(tmp_path, f"{text}\n"))
    assert (problem.code, problem.message) == ("QT002", f"not valid TOML: {message}")
    assert (problem.line, *problem.underline) == place and problem.column == place[1]
    assert problem.hint is None if hint is None else problem.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "name", "first", "again"),
    [
        ("# r\nr = 8\ns = 1\n  r = 9", "r", (2, 1, 1), (4, 3, 1)),
        ('[a]\n"b c" = 1\n"b c" = 2', "b c", (2, 1, 5), (3, 1, 5)),
        ("[x.y]\n[x]\n[a]\nb = 1\n[a]\nc = 1", "a", (3, 2, 1), (5, 2, 1)),
        ("[[a]]\n[[a]]\nr = 1\nr = 2", "r", (3, 1, 1), (4, 1, 1)),
        ("[[a]]\n[[a]]\n[a.b]\n[a.b]", "b", (3, 4, 1), (4, 4, 1)),
        ("a.b = 1\na = 2", "a", (1, 1, 1), (2, 1, 1)),
        ("a = 1\r\na.b = 2", "a", (1, 1, 1), (2, 1, 1)),
        ("x = 1\n[x]", "x", (1, 1, 1), (2, 2, 1)),
    ],
)
def test_a_key_that_is_set_twice_is_shown_at_both_places(tmp_path, text, name, first, again):
    (problem,) = problems(write(tmp_path, text))
    assert problem.message == f'not valid TOML: "{name}" is set twice'
    (other,) = problem.related
    assert (other.line, *other.underline) == first and other.label == "set here first"
    assert (problem.line, *problem.underline) == again


def test_a_table_beside_the_older_spelling_of_the_adapter_is_told_how_to_be_one(tmp_path):
    (problem,) = problems(write(tmp_path, 'adapter = "qlora"\n' + VALID))
    assert problem.message == 'not valid TOML: "adapter" is set twice'
    assert problem.hint == 'write type = "qlora" under [adapter], and leave out adapter = "qlora"'


def test_a_yaml_is_told_to_be_migrated(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("base_model: org/model\nadapter: lora\n")
    (problem,) = problems(path)
    assert f"quantune migrate {path}" in problem.hint


def test_no_text_makes_the_loader_fail_and_every_place_is_in_the_text(tmp_path):
    randomly = random.Random(0)
    pieces = ["[", "]", "{", "}", "=", ".", ",", '"', "'", '"""', "\n", "\\", "#", " ", "r", "\x00", "é", "r = 1\n"]
    path = tmp_path / "recipe.toml"
    refused = 0
    for seed in range(2000):
        text = Document(seed).text if seed % 2 else VALID
        for _ in range(randomly.randrange(1, 4)):
            at, end = sorted((randomly.randrange(len(text) + 1), randomly.randrange(len(text) + 1)))
            copied = text[at : min(end, at + 30)]
            text = randomly.choice((text[:at] + randomly.choice(pieces) + text[at:], text[:at] + copied + text[at:]))
        path.write_bytes(text.encode())
        try:
            load_recipe(path, options_of=options_of)
        except RecipeError as error:
            lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
            refused += isinstance(error.__cause__, tomli.TOMLDecodeError)
            for place in [place for problem in error.problems for place in (problem, *problem.related)]:
                if place.line is not None and place.source_line is not None:
                    assert place.source_line == lines[place.line - 1], text
                    assert place.underline[0] - 1 + place.underline[1] <= len(place.source_line) + 1, text
    assert refused > 500
