"""The commands as a person runs them: what they print, what they import, what they exit with."""

from __future__ import annotations

import json

import pytest
from commands import QUICKSTART, in_turn, quantune_command, recipe, refused

import quantune

LIGHT = [
    ["--help"],
    ["run", "--help"],
    ["--version"],
    ["check", QUICKSTART],
    ["check", QUICKSTART, "--json"],
    ["schema"],
    ["explain", "QT012"],
    ["init", "--help"],
    ["backends", "list"],
    ["backends", "list", "--json"],
    ["backends", "show", "bnb"],
    ["backends", "show", "torchao", "--json"],
    ["backends", "check", "--help"],
]
HEAVY = {"torch", "transformers", "bitsandbytes", "peft", "numpy"}


@pytest.fixture(scope="module")
def of_light():
    """What becomes of each command that loads nothing."""
    return in_turn(LIGHT)


@pytest.mark.parametrize("number", range(len(LIGHT)), ids=[" ".join(given) for given in LIGHT])
def test_a_command_that_loads_nothing_imports_neither_torch_nor_transformers(of_light, number):
    code, stdout, stderr, imported = of_light[number]
    assert code == 0, stderr
    assert stdout and not HEAVY & set(imported)


def test_the_version_is_that_of_the_package():
    assert quantune_command("--version").stdout == f"quantune {quantune.__version__}\n"


def test_check_prints_a_recipe_that_is_right_and_complete(tmp_path):
    done = quantune_command("check", QUICKSTART)
    assert done.returncode == 0 and "is right" in done.stderr
    (tmp_path / "again.toml").write_text(done.stdout)
    again = quantune_command("check", str(tmp_path / "again.toml"), "--set", "output.dir=runs/quickstart")
    assert again.returncode == 0 and again.stdout == done.stdout


def test_check_prints_json_with_overrides_applied():
    done = quantune_command("check", QUICKSTART, "--json", "--set", "adapter.r=4")
    document = json.loads(done.stdout)
    assert document["adapter"]["r"] == 4 and document["quantization"]["block_size"] == 64


def test_check_prints_text_as_it_stands_in_the_recipe(tmp_path):
    text = '[output]\ndir = "runs/:smile: [bold]x[/bold] [/]"'
    done = quantune_command("check", recipe(tmp_path, text))
    assert 'dir = "runs/:smile: [bold]x[/bold] [/]"' in done.stdout


def test_check_takes_a_recipe_in_a_folder_with_brackets_in_its_name(tmp_path):
    folder = tmp_path / "[a]" / "[" / "b]"
    folder.mkdir(parents=True)
    done = quantune_command("check", recipe(folder))
    assert done.returncode == 0 and f"{folder}/recipe.toml is right" in done.stderr


def test_a_wrong_recipe_shows_each_problem_with_its_line_and_a_caret(tmp_path):
    said = refused("check", recipe(tmp_path, "[adapter]\nalpa = 3\nr = 0"))
    assert f'{tmp_path}/recipe.toml:9:1 [adapter.alpa] unknown key "alpa"  QT012' in said
    assert '    9 | alpa = 3\n      | ^^^^\n      = did you mean "alpha"?\n' in said
    assert "   10 | r = 0\n      |     ^\n" in said
    assert "2 problems in the recipe; quantune explain QT012 tells more" in said


def test_the_problems_of_a_wrong_recipe_are_printed_as_json(tmp_path):
    done = quantune_command("check", recipe(tmp_path, "[adapter]\nalpa = 3\nr = 0"), "--json")
    assert done.returncode == 2 and done.stderr == ""
    unknown, range_ = json.loads(done.stdout)["problems"]
    assert (unknown["code"], unknown["line"], unknown["column"], unknown["underline"]) == ("QT012", 9, 1, [1, 4])
    assert (range_["code"], range_["where"], range_["underline"]) == ("QT014", "adapter.r", [5, 1])


def test_warnings_are_in_the_json_of_a_right_recipe_and_of_a_wrong_one(tmp_path):
    older = "[adapter]\nload_in_4bit = true\n"
    right = quantune_command("check", recipe(tmp_path, older), "--json")
    assert right.returncode == 0 and right.stderr == ""
    document = json.loads(right.stdout)
    assert document["adapter"]["r"] == 16 and [one["code"] for one in document["warnings"]] == ["QT040"]
    more = "quantize_moe_experts = true\nload_in_8bit = true"
    wrong = json.loads(quantune_command("check", recipe(tmp_path, f"{older}{more}"), "--json").stdout)
    assert [(one["code"], one["where"]) for one in wrong["warnings"]] == [("QT040", "adapter.quantize_moe_experts")]
    assert {place["origin"] for one in wrong["problems"] for place in one["related"]} == {f"{tmp_path}/recipe.toml"}
    (tmp_path / "train.jsonl").unlink()
    path = tmp_path / "recipe.toml"
    path.write_text(path.read_text().replace("load_in_8bit = true", ""))
    gone = json.loads(quantune_command("check", str(path), "--json").stdout)
    assert [len(gone[part]) for part in ("problems", "warnings")] == [1, 2]


def test_the_hundredth_line_is_written_as_a_number(tmp_path):
    said = refused("check", recipe(tmp_path, "[adapter]" + "\n" * 92 + "r = 0"))
    assert "recipe.toml:100:1 [adapter.r]" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.toml"], "there is no such file"),
        (["check", "recipes"], "found a folder"),
        (["check"], "Missing argument"),
        (["check", QUICKSTART, "--sett", "a.b=1"], "No such option"),
        (["check", QUICKSTART, "--set", "adapter"], "expected section.key=value"),
        (["check", QUICKSTART, "--set", "adapter.r=0"], "--set adapter.r=0 [adapter.r] must be greater than 0"),
        (["check", QUICKSTART, "--set", "data.train[0].path=gone.csv"], "--set data.train[0].path=gone.csv"),
        (["run", QUICKSTART, "--set", "quantization.backend=zzz"], 'found "zzz"'),
        (["run", "nowhere.toml"], "there is no such file"),
        (["run", QUICKSTART, "--resume", "--overwrite"], "give one of them"),
        (["generate", "nowhere", "-p", "x"], "found no recipe.toml in nowhere"),
        (["nothing"], "No such command"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_anywhere_on_the_line_shows_the_traceback_as_well(place):
    arguments = ["check", "nowhere.toml"]
    arguments.insert(place, "--debug")
    done = quantune_command(*arguments)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "RecipeError" in done.stderr
    assert "1 problem in the recipe" in done.stderr
