"""Running the commands as a person does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forking

ROOT = Path(__file__).parents[1]
QUICKSTART = "recipes/quickstart.toml"


def quantune_command(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `quantune` in the repository or another folder, wide enough that no line of a table wraps.

    It runs in a process forked from this one; what is true of a new Python alone is for `new_process`.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        done = forking.start(*arguments, output=output, errors=errors, cwd=cwd, **variables).end()
        return subprocess.CompletedProcess(arguments, done.code, done.said, errors.read_text())


def new_process(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m quantune`, which imports what it needs, in the repository or another folder."""
    env = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-m", "quantune", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=forking.TIMEOUT)


IN_TURN = """
import contextlib, io, json, sys
import quantune.cli
done = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["quantune", *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            quantune.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    packages = {name.partition(".")[0] for name in sys.modules}
    done.append([code, stdout.getvalue(), stderr.getvalue(), sorted(packages)])
print(json.dumps(done))
"""


def in_turn(commands: Sequence[Sequence[str]], *, cwd: Path = ROOT, **variables: str) -> list[list[Any]]:
    """Run commands one after the other in one Python that has imported nothing yet.

    Returns the exit code of each, what it wrote to standard output and error, and the packages imported by then.
    """
    env = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=forking.TIMEOUT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """What a command says on standard error when it exits with 2, without a traceback."""
    done = quantune_command(*arguments, cwd=cwd, **variables)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr


def recipe(folder: Path, text: str = "", *, backend: str = "bnb") -> str:
    """A recipe whose data is there, with lines added at its end."""
    (folder / "train.jsonl").write_text("{}\n")
    path = folder / "recipe.toml"
    adapter = "" if "[adapter]" in text else "[adapter]\n"
    path.write_text(
        f'[model]\nbase = "builtin:mini"\n[quantization]\nbackend = "{backend}"\n'
        f'[[data.train]]\npath = "train.jsonl"\nformat = "chat"\n{text}\n{adapter}'
    )
    return str(path)
