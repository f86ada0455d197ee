"""A plugin needs nothing but the public API, works in every command, and is the one that docs/plugins.md shows."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import tomli
from commands import ROOT, quantune_command, recipe, refused
from plugin_packages import install_text

TINY = Path(__file__).parent / "tiny_plugin"
PAGE = ROOT / "docs" / "plugins.md"
PUBLIC = {
    *(f"quantune.backends.{module}" for module in ("backend", "description", "kernels", "layout", "readers")),
    "quantune.backends",  # `from quantune.backends import kernels`
    "quantune.errors",
    "quantune.testing",
}


@pytest.fixture
def installed(tmp_path):
    """A folder for PYTHONPATH with the tiny plugin in it, as its pyproject.toml says."""
    folder = tmp_path / "site"
    shutil.copytree(TINY / "quantune_tiny", folder / "quantune_tiny", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomli.loads((TINY / "pyproject.toml").read_text())["project"]
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["quantune.backends"].items()]
    return install_text(folder, "quantune_tiny", "\n".join(["[quantune.backends]", *lines, ""]))


def write_rows(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"After {n}?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def test_it_imports_nothing_of_quantune_but_the_public_api():
    imported = set()
    for path in TINY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
    ours = {name for name in imported if name == "quantune" or name.startswith("quantune.")}
    assert ours and ours <= PUBLIC


def test_a_recipe_is_checked_against_its_options(installed, tmp_path):
    path = recipe(tmp_path, backend="tiny")
    done = quantune_command("check", path, "--set", "quantization.weight_dtype=int4", PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    assert 'weight_dtype = "int4"\ngroup_size = 32\n' in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantization.group_size=64", 'group_size has no meaning for weight_dtype = "int8", which has one scale'),
        ("quantization.weight_dtype=int2", 'expected one of "int8", "int4", found "int2"'),
        ("quantization.weight_dtype=nf4", 'nf4 is a format of another backend: backend = "bnb"'),
        ("quantization.group=64", 'unknown key "group" for backend "tiny"'),
    ],
)
def test_what_its_options_refuse_is_a_problem_of_the_recipe(installed, tmp_path, change, message):
    said = refused("check", recipe(tmp_path, backend="tiny"), "--set", change, PYTHONPATH=installed)
    assert message in said and "--set quantization." in said


def test_it_is_listed_shown_and_found_sound(installed):
    (row,) = [
        row
        for row in json.loads(quantune_command("backends", "list", "--json", PYTHONPATH=installed).stdout)
        if row["name"] == "tiny"
    ]
    assert row["package"] == "quantune_tiny" and row["status"] == "installed"
    shown = quantune_command("backends", "show", "tiny", PYTHONPATH=installed).stdout
    assert "weights of a row that share one scale" in shown
    checked = quantune_command("backends", "check", "tiny", "--json", PYTHONPATH=installed)
    assert checked.returncode == 0, checked.stdout
    (row,) = json.loads(checked.stdout)
    assert row["status"] == "works" and row["devices"][0] == "cpu"


def test_a_run_trains_over_it(installed, tmp_path):
    output = tmp_path / "run"
    path = recipe(tmp_path, f'[training]\nmax_steps = 2\nbatch_size = 4\n[output]\ndir = "{output}"', backend="tiny")
    write_rows(tmp_path)
    done = quantune_command("run", path, "--set", "quantization.weight_dtype=int4", PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    assert len(losses(output)) == 2 and all(0 < loss < 10 for loss in losses(output))
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    resolved = tomli.loads((output / "recipe.toml").read_text())
    assert resolved["quantization"] == {
        "backend": "tiny",
        "skip": [],
        "experts": True,
        "weight_dtype": "int4",
        "group_size": 32,
    }


def blocks() -> dict[str, str]:
    """The files in docs/plugins.md, by the name in bold before each."""
    found = re.findall(r"^\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_page_holds_the_plugin_that_the_tests_run():
    files = [path for path in TINY.rglob("*") if path.suffix in (".py", ".toml")]
    assert blocks().keys() == {path.relative_to(TINY).as_posix() for path in files}
    for path in files:
        assert blocks()[path.relative_to(TINY).as_posix()] == path.read_text(), path


def test_the_page_names_what_there_is():
    text = PAGE.read_text()
    from quantune.backends import kernels
    from quantune.backends.backend import Backend
    from quantune.testing.weights import KINDS

    for name in re.findall(r"`kernels\.(\w+)", text):
        assert hasattr(kernels, name), name
    for name in ("inner_tensors", "pack", "dequantize", "fills_out", "merge", "export", "adopt"):
        assert f"`{name}" in text and hasattr(Backend, name)
    assert all(f"`{kind}`" in text for kind in KINDS)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (PAGE.parent / target).exists(), target


def test_the_recipes_on_the_page_are_right(installed, tmp_path):
    recipes = re.findall(r"^```toml\n(\[quantization\]\n.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert recipes
    write_rows(tmp_path)
    for number, text in enumerate(recipes):
        path = tmp_path / f"recipe-{number}.toml"
        path.write_text(
            f'[model]\nbase = "builtin:mini"\n{text}[adapter]\n[[data.train]]\npath = "train.jsonl"\nformat = "chat"\n'
        )
        done = quantune_command("check", str(path), PYTHONPATH=installed)
        assert done.returncode == 0, done.stderr
