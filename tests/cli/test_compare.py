"""`quantune backends compare` as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from commands import in_turn, quantune_command

PLUGIN = """\
import attrs
from quantune.backends.description import BackendDescription, Probe

@attrs.frozen(kw_only=True)
class Options:
    weight_dtype: str = "w4"

def load():
    raise RuntimeError("[/] no such kernel")

description = BackendDescription(
    name="mine", summary="", weight_dtypes=("w4",), options=Options, probe=lambda: Probe(available=True), load=load
)
"""


def compare(*arguments, cwd, **variables):
    """Run `quantune backends compare` in a folder, in a Python that has imported nothing yet."""
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80", **variables}
    command = [sys.executable, "-m", "quantune", "backends", "compare", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def install(folder, code):
    """Put a distribution with the backend `mine` into a folder."""
    info = folder / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantune.backends]\nmine = plugin:description\n")
    (folder / "plugin.py").write_text(code)
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_two_formats_are_compared_as_json_with_a_chart(tmp_path):
    arguments = ("--only", "bnb:int8,torchao:nf4", "--max-tokens", "200", "--json", "--chart", "chart.svg")
    done = compare("builtin:mini", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "chart: chart.svg\n"
    document = json.loads(done.stdout)
    reference, int8, nf4 = document["rows"]
    assert [row["format"] for row in document["rows"]] == ["unquantized", "bnb:int8", "torchao:nf4"]
    assert reference["outputs"]["kl"] == 0 and 0 < int8["outputs"]["kl"] < nf4["outputs"]["kl"]
    assert document["setting"]["tokens"] == 200 and document["setting"]["text"] == "built-in"
    assert (
        len(list(ElementTree.parse(tmp_path / "chart.svg").getroot().iter("{http://www.w3.org/2000/svg}circle"))) == 2
    )


def test_a_folder_a_text_and_a_broken_plugin_make_two_tables_and_a_reason(tmp_path):
    from quantune.model import mini

    (tmp_path / "model").symlink_to(mini.PATH)
    (tmp_path / "text.txt").write_text("On the third of May, Clara went to the market with a small lamp. " * 3)
    path = install(tmp_path, PLUGIN)
    arguments = ("--only", "fp8,mine", "--text", "text.txt", "--chart", "chart.html")
    done = compare("model", *arguments, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "mine:w4 can't be measured here: " in done.stdout and "RuntimeError: [/] no such kernel" in done.stdout
    assert "perplexity" in done.stdout and "down_proj" in done.stdout and "…" not in done.stdout
    assert "fp8: 8.00 bits" in done.stderr and "Loading weights" not in done.stderr
    assert (tmp_path / "chart.html").read_text().startswith("<!DOCTYPE html>")


BAD_INPUT = [
    (["builtin:mini", "--only", "bnb:nf5"], 'did you mean "bnb:nf4"?'),
    (["builtin:mini", "--only", "hqq"], "pip install quantune-hqq"),
    (["builtin:mini", "--only", ""], "expected names of formats, found none"),
    (["builtin:mini", "--text", "gone.txt"], "gone.txt can't be read: No such file or directory"),
    (["builtin:mini", "--text", "."], "can't be read: Is a directory"),
    (["builtin:mini", "--text", "blank.txt"], "blank.txt is blank"),
    (["builtin:mini", "--text", "bytes.txt"], "expected a text file in UTF-8"),
    (["builtin:mini", "--chart", "chart.png"], "expected a file ending in .svg or .html"),
    (["builtin:mini", "--chart", "gone/chart.svg"], "there is no folder gone"),
    (["builtin:mini", "--max-tokens", "3"], "--max-tokens"),
    (["builtin:mini", "--device", "tpu"], "--device"),
    (["builtin:huge"], 'there is no built-in model "builtin:huge"; there is builtin:mini'),
    (["./nowhere"], "there is no folder ./nowhere"),
    (["empty"], "found no config.json in empty"),
    ([""], "expected a model, found nothing"),
    ([], "Missing argument"),
]


@pytest.fixture(scope="module")
def of_bad_input(tmp_path_factory):
    """What becomes of each bad input where importing anything heavy ends the command."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "blank.txt").write_text(" \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty").mkdir()
    heavy = folder / "path"
    for name in ("torch", "transformers", "numpy"):
        (heavy / name).mkdir(parents=True)
        (heavy / name / "__init__.py").write_text("raise SystemExit('imported too early')")
    path = os.pathsep.join([str(heavy), os.environ.get("PYTHONPATH", "")])
    commands = [["backends", "compare", *arguments] for arguments, _ in BAD_INPUT]
    return in_turn(commands, cwd=folder, PYTHONPATH=path)


@pytest.mark.parametrize("number", range(len(BAD_INPUT)), ids=[" ".join(given) for given, _ in BAD_INPUT])
def test_bad_input_is_a_sentence_and_exit_code_2_before_torch_is_imported(of_bad_input, number):
    code, stdout, stderr, _ = of_bad_input[number]
    assert code == 2, stderr
    assert BAD_INPUT[number][1] in " ".join(stderr.split()) and "Traceback" not in stderr and stdout == ""


def test_a_text_of_a_few_tokens_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    done = quantune_command("backends", "compare", "builtin:mini", "--text", "short.txt", cwd=tmp_path)
    assert done.returncode == 2 and "the text short.txt has" in done.stderr and "at least 16" in done.stderr
    assert "Traceback" not in done.stderr
