"""Runs with several processes, started as people and launchers start them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUANTUNE = (sys.executable, "-m", "quantune")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "QUANTUNE_LAUNCH")
"""Variables that a test's process may have from whatever started it."""
PATIENCE = 150
"""Seconds until a run counts as hung."""


def recipe(folder: Path, steps: int = 4, **distributed: object) -> Path:
    """A recipe for a run on the CPU whose folder is `run`."""
    rows = ({"prompt": f"Count {n}", "response": f"{n}, then {n + 1}."} for n in range(12))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    keys = {"timeout": 60, **distributed}
    path.write_text(
        '[model]\nbase = "builtin:mini"\n[adapter]\nr = 4\n[[data.train]]\npath = "rows.jsonl"\nformat = "instruct"\n'
        f"[training]\nmax_steps = {steps}\nbatch_size = 4\nmicro_batch_size = 1\nlearning_rate = 1e-3\n"
        'precision = "fp32"\ndevice = "cpu"\n[logging]\nevery_steps = 1\n'
        f'[output]\ndir = "{folder / "run"}"\n[distributed]\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    )
    return path


@contextlib.contextmanager
def started(command: Sequence[object], environment: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[str]]:
    """A command that runs for as long as the context is open, at most."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "NO_COLOR": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def ran(*command: object, **environment: str) -> tuple[int, str, str]:
    """As `finish`, from start to end."""
    with started(command, environment) as process:
        return finish(process)


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something that a running command is to do.

    Raises:
        AssertionError: the command ended, or time was up, before it did.
    """
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < PATIENCE, "it did not come to that"
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    """Steps in the metrics of a run."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def log(folder: Path, rank: int) -> str:
    """What a rank has said into its log."""
    path = folder / "logs" / f"rank-{rank}.log"
    return path.read_text() if path.exists() else ""


def worker(folder: Path, rank: int) -> int:
    """The process id of a rank, at its last attempt."""
    if rank == 0:
        return int(re.findall(r"process (\d+)", (folder / ".lock").read_text())[-1])
    return int(re.findall(r"attempt \d+, process (\d+)", log(folder, rank))[-1])


def alive(process: int) -> bool:
    """Whether a process runs, rather than being gone or not yet waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
