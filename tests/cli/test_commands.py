"""The commands as a person runs them: what they print, what they import, what they exit with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantune

ROOT = Path(__file__).parents[2]
QUICKSTART = "recipes/quickstart.toml"
DESCRIPTION = """\
import attrs
from quantune.backends.description import BackendDescription, Probe

@attrs.frozen(kw_only=True)
class Options:
    weight_dtype: str = "w4"
    group_size: int = 128

description = BackendDescription(
    name="mine", summary="", weight_dtypes=("w4",), options=Options, probe=lambda: Probe(available=True), load=None
)
"""


def quantune_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m quantune` in the repository, wide enough that no line of a table wraps."""
    env = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-m", "quantune", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def refused(*arguments: str, **variables: str) -> str:
    """What a command says on standard error when it exits with 2, without a traceback."""
    done = quantune_command(*arguments, **variables)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr


def install(folder: Path, package: str, backends: dict[str, str], code: str | None = None) -> str:
    """Put a distribution with backends into `folder`; its module is named like the package."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in backends.items()]
    (info / "entry_points.txt").write_text("\n".join(["[quantune.backends]", *lines, ""]))
    if code is not None:
        (folder / f"{package}.py").write_text(code)
    return str(folder)


def rows(folder: str) -> dict[str, dict]:
    """`backends list --json` with `folder` on the path, by name."""
    done = quantune_command("backends", "list", "--json", PYTHONPATH=folder)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def recipe(folder: Path, text: str = "", *, backend: str = "bnb") -> str:
    """A recipe whose data is there, with lines added at its end."""
    (folder / "train.jsonl").write_text("{}\n")
    path = folder / "recipe.toml"
    path.write_text(
        f'[model]\nbase = "builtin:mini"\n[quantization]\nbackend = "{backend}"\n'
        f'[[data.train]]\npath = "train.jsonl"\nformat = "chat"\n{text}\n'
    )
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["check", QUICKSTART],
        ["check", QUICKSTART, "--json"],
        ["backends", "list"],
        ["backends", "list", "--json"],
    ],
    ids=" ".join,
)
def test_a_command_that_loads_nothing_imports_neither_torch_nor_transformers(arguments):
    script = (
        "import sys, quantune.cli\n"
        f"sys.argv = ['quantune', *{arguments!r}]\n"
        "code = 0\n"
        "try:\n    quantune.cli.main()\n"
        "except SystemExit as stop:\n    code = stop.code or 0\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'peft', 'numpy'} & set(sys.modules)\n"
        "print('|', code, sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.rstrip().endswith("| 0 []"), done.stderr
    assert done.stdout


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
    assert "    9 | alpa = 3\n        ^\n" in said
    assert 'did you mean "alpha"?' in said
    assert "2 problems in the recipe" in said


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


def test_the_built_in_backend_is_listed_with_what_it_can_do():
    (row,) = json.loads(quantune_command("backends", "list", "--json").stdout)
    assert row["name"] == "bnb" and row["package"] == "quantune" and row["status"] == "available"
    assert row["weight_dtypes"] == ["nf4", "fp4", "int8"]


def test_an_installed_plugin_is_listed_without_being_imported(tmp_path):
    code = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"
    found = rows(install(tmp_path, "plugin", {"mine": "plugin:description"}, code))
    assert list(found) == ["bnb", "mine"]
    assert found["mine"]["package"] == "plugin" and found["mine"]["version"] == "1.0"
    assert found["mine"]["status"] == "installed"
    assert not (tmp_path / "plugin.imported").exists()
    assert "mine" in quantune_command("backends", "list", PYTHONPATH=str(tmp_path)).stdout


def test_a_plugin_that_claims_a_built_in_name_is_a_row_that_says_so_and_shadows_nothing(tmp_path):
    folder = install(tmp_path, "impostor", {"bnb": "impostor:description"}, "raise RuntimeError")
    found = rows(folder)
    assert found["bnb"]["package"] == "quantune" and found["bnb"]["status"] == "available"
    assert found["bnb (impostor)"]["status"] == "broken"
    assert "impostor claims the name of a built-in backend" in found["bnb (impostor)"]["reason"]
    assert quantune_command("check", QUICKSTART, PYTHONPATH=folder).returncode == 0


def test_a_name_that_two_packages_claim_is_one_row_that_names_both_and_can_not_be_used(tmp_path):
    install(tmp_path, "one", {"mine": "one:description"})
    folder = install(tmp_path, "two", {"mine": "two:description"})
    assert rows(folder)["mine"]["status"] == "broken"
    assert rows(folder)["mine"]["reason"] == "claimed by one and two; uninstall all but one"
    assert "claimed by one and two" in refused("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)


def test_a_package_without_metadata_does_not_break_the_list(tmp_path):
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"})
    (tmp_path / "plugin-1.0.dist-info" / "METADATA").unlink()
    install(tmp_path, "sound", {"mine": "plugin:description", "other": "sound:description"})
    found = rows(folder)
    assert found["mine"]["reason"] == "claimed by sound and unknown; uninstall all but one"
    assert found["other"]["status"] == "installed"


def test_a_plugin_brings_its_own_options(tmp_path):
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"}, DESCRIPTION)
    done = quantune_command("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)
    assert done.returncode == 0 and "group_size = 128" in done.stdout
    wrong = ("--set", "quantization.block_size=64")
    said = refused("check", recipe(tmp_path, backend="mine"), *wrong, PYTHONPATH=folder)
    assert 'unknown key "block_size" for backend "mine"' in said


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import not_installed_anywhere", "can't be imported: ModuleNotFoundError"),
        ("raise RuntimeError('[/] broken')", "can't be imported: RuntimeError: [/] broken"),
        ("import sys; sys.exit(3)", "can't be imported: SystemExit: 3"),
        ("other = 1", "can't be imported: AttributeError"),
        ("description = 1", "expected its entry point to be a BackendDescription, found int"),
        (DESCRIPTION.replace('name="mine",', 'name="mine", api_version=99,'), "was written for version 99"),
        (DESCRIPTION.replace("options=Options", "options=dict"), "expected its options to be an attrs class"),
    ],
)
def test_a_broken_plugin_that_a_recipe_names_is_a_message_with_its_package(tmp_path, code, message):
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"}, code)
    said = refused("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)
    assert message in said and 'backend "mine" of package plugin' in said
    assert "[quantization.backend]" in said and "recipe.toml:4:1" in said
