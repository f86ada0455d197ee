"""Running the commands as a person does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
