"""The command line from outside: what it prints, where, with which exit code, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import quantune

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "numpy")
SPY = f"""
import sys, json
from quantune.cli import main
sys.argv = ["quantune", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print("HEAVY", json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
sys.exit(code)
"""


def call(*arguments, code=0, script=None, **variables):
    command = [sys.executable, "-c", script] if script else [sys.executable, "-m", "quantune"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["check"], ["check", "--json"], ["backends", "list"]],
)
def test_commands_that_do_not_compute_import_no_torch(arguments, quickstart):
    if arguments[0] == "check":
        arguments = [*arguments, quickstart]
    assert "HEAVY []" in call(*arguments, script=SPY).stderr


def test_the_version(quickstart):
    assert call("--version").stdout == f"quantune {quantune.__version__}\n"


def test_check_prints_the_recipe_with_its_defaults(quickstart):
    done = call("check", quickstart)
    assert 'backend = "bnb"' in done.stdout and "block_size = 64" in done.stdout
    assert "is right" in done.stderr
    document = json.loads(call("check", quickstart, "--json", "--set", "adapter.r=4").stdout)
    assert document["adapter"]["r"] == 4 and document["quantization"]["double_quant"] is True


def test_a_wrong_recipe_shows_the_line_with_a_caret_and_no_traceback(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[model]\nbase = "builtin:mini"\nbas = 1\n[[data.train]]\npath = "x.jsonl"\nformat = "chat"\n')
    done = call("check", path, code=2)
    assert f"{path}:3:1 [model.bas] unknown key" in done.stderr
    assert "    3 | bas = 1\n        ^\n" in done.stderr
    assert 'did you mean "base"?' in done.stderr and "1 problem in the recipe" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert "Traceback" in call("check", path, "--debug", code=2).stderr


def test_a_run_checks_its_recipe_before_it_imports_torch(tmp_path):
    assert "HEAVY []" in call("run", tmp_path / "gone.toml", code=2, script=SPY).stderr


def test_resume_and_overwrite_exclude_each_other(quickstart):
    assert "give one of them" in call("run", quickstart, "--resume", "--overwrite", code=2).stderr


def test_generate_needs_a_run_and_a_prompt(tmp_path, quickstart):
    assert "found no recipe.toml" in call("generate", tmp_path, "--prompt", "x", code=2).stderr


def test_backends_list_says_what_is_here():
    assert "nf4, fp4, int8" in call("backends", "list").stdout
    (row,) = [row for row in json.loads(call("backends", "list", "--json").stdout) if row["name"] == "bnb"]
    assert row["status"] == "available" and row["devices"] == ["cpu", "cuda"] and row["package"] == "quantune"


def install(folder, package, entries):
    """A distribution's metadata, as pip leaves it; importing it would fail."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {package}:description\n" for name in entries)
    (info / "entry_points.txt").write_text(f"[quantune.backends]\n{lines}")
    (folder / f"{package}.py").write_text("raise RuntimeError('imported')\n")


def test_third_party_backends_are_listed_without_being_imported(tmp_path):
    install(tmp_path, "alien", ["alien"])
    rows = json.loads(call("backends", "list", "--json", PYTHONPATH=str(tmp_path)).stdout)
    (row,) = [row for row in rows if row["name"] == "alien"]
    assert (row["status"], row["package"], row["version"]) == ("installed", "alien", "1.0")


def test_a_name_claimed_twice_and_a_built_in_s_name_are_rows_that_say_why(tmp_path):
    install(tmp_path, "one", ["same", "bnb"])
    install(tmp_path, "two", ["same"])
    rows = json.loads(call("backends", "list", "--json", PYTHONPATH=str(tmp_path)).stdout)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["same"] == "claimed by one and two; uninstall all but one"
    assert reasons["bnb (one)"] == "one claims the name of a built-in backend"
    assert reasons["bnb"] is None


def test_a_broken_plugin_in_a_recipe_is_one_message(tmp_path, quickstart):
    install(tmp_path, "alien", ["alien"])
    done = call("check", quickstart, "--set", "quantization.backend=alien", code=2, PYTHONPATH=str(tmp_path))
    assert "of package alien 1.0 can't be imported: RuntimeError: imported" in done.stderr
    assert "Traceback" not in done.stderr
