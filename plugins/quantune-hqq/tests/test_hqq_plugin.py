"""Installing the package is all it takes: every command knows `backend = "hqq"`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantune_hqq import HqqOptions, description

PACKAGE = Path(__file__).resolve().parent.parent
RECIPE = """
[model]
base = "builtin:mini"

[quantization]
backend = "hqq"
weight_dtype = "int3"

[adapter]
r = 4

[[data.train]]
path = "train.jsonl"
format = "instruct"

[training]
max_steps = 3
batch_size = 4
learning_rate = 1e-3

[output]
dir = "{folder}/run"
"""


IN_TURN = """
import json, sys
import quantune.cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["quantune", *arguments]
    try:
        quantune.cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


class Quantune:
    """quantune's commands in a folder, with a path on which this package is installed."""

    def __init__(self, folder, path):
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}

    def __call__(self, *arguments, code=0):
        """Run one command."""
        return self._python("-m", "quantune", *arguments, code=code)

    def in_turn(self, *commands):
        """Run several in one process: importing what trains takes longer than three steps."""
        return self._python("-c", IN_TURN, json.dumps(commands))

    def _python(self, *arguments, code=0):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def quantune(installed, tmp_path):
    """quantune in a folder with a recipe and its data, this package installed."""
    rows = [{"prompt": f"What comes after {n}?", "response": str(n + 1)} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("{folder}", str(tmp_path)))
    others = (part for part in sys.path if part and Path(part).resolve() != PACKAGE)
    return Quantune(tmp_path, os.pathsep.join([str(installed), *others]))


def test_it_is_listed_with_its_package_and_version(quantune):
    rows = {row["name"]: row for row in json.loads(quantune("backends", "list", "--json").stdout)}
    assert rows["hqq"]["package"] == "quantune-hqq" and rows["hqq"]["version"] == "0.1.0"
    assert rows["hqq"]["status"] in ("installed", "available")


def test_a_recipe_is_checked_and_completed(quantune):
    table = json.loads(quantune("check", "recipe.toml", "--json").stdout)["quantization"]
    expected = {"backend": "hqq", "weight_dtype": "int3", "group_size": 64, "iterations": 20, "lp_norm": 0.7}
    assert expected.items() <= table.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('quantization.weight_dtype="int5"', 'expected one of "int8", "int4", "int3", "int2"'),
        ("quantization.weight_dtype=3", 'weight_dtype = "int3"'),
        ("quantization.group_size=12", "expected a positive multiple of 8, found 12"),
        ("quantization.lp_norm=2.0", "must be greater than 0 and at most 1, found 2.0"),
        ("quantization.block_size=64", 'block_size has no meaning for backend "hqq"'),
    ],
)
def test_a_wrong_option_is_a_message_and_exit_code_2(quantune, change, message):
    assert message in quantune("check", "recipe.toml", "--set", change, code=2).stderr


def test_it_trains_and_generates(quantune, tmp_path):
    done = quantune.in_turn(["run", "recipe.toml"], ["generate", "run", "--prompt", "5?", "--max-new-tokens", "4"])
    assert "int3 (3.50 bits)" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert done.stdout.strip()


def test_a_number_of_bits_in_place_of_a_dtype_is_understood():
    assert HqqOptions.hint("weight_dtype", 3) == 'weight_dtype = "int3"'
    assert HqqOptions.hint("weight_dtype", "nf4") is None


def test_its_defaults_are_4_bit_in_groups_of_64():
    assert HqqOptions().resolved() == HqqOptions(weight_dtype="int4", group_size=64, iterations=20, lp_norm=0.7)
    assert tuple(description.bits_per_weight) == description.weight_dtypes
