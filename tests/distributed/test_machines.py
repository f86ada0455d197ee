"""Two machines, each a network namespace with an interface of its own, joined by a cable."""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest
from launching import QUANTUNE, finish, log, recipe, started, steps_done, until, worker
from ranks import on_ranks
from support import Silent

from quantune.checkpoint.run_folder import RunFolder
from quantune.cli.recipes import open_recipe
from quantune.training.run import train

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HELD = ("sleep", "600")


@pytest.fixture(scope="module")
def machines():
    """What to put before a command to run it on either machine."""
    if not (shutil.which("unshare") and shutil.which("nsenter") and shutil.which("ip")):
        pytest.skip("needs unshare, nsenter (util-linux) and ip (iproute2)")
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let users make network namespaces")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(["unshare", "-rn", *HELD]))
        until(lambda: _comm(first) == "sleep", first)
        inside = ["nsenter", "--preserve-credentials", "-t", str(first.pid), "-U"]
        second = stack.enter_context(started([*inside, "-n", "unshare", "-n", *HELD]))
        until(lambda: _comm(second) == "sleep", second)
        at = [[*inside, f"--net=/proc/{process.pid}/ns/net"] for process in (first, second)]
        subprocess.run(
            [*at[0], "ip", "link", "add", "cable0", "type", "veth", "peer", "cable1", "netns", str(second.pid)],
            check=True,
        )
        for number, address in enumerate(ADDRESSES):
            for words in (
                ["addr", "add", f"{address}/24", "dev", f"cable{number}"],
                ["link", "set", f"cable{number}", "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run([*at[number], "ip", *words], check=True)
        yield at


def _comm(process):
    with open(f"/proc/{process.pid}/comm") as file:
        return file.read().strip()


def several(path, number, *more):
    """The command of one of the machines."""
    return [*QUANTUNE, "run", path, "--nodes", 2, "--node-rank", number, "--rendezvous", f"{ADDRESSES[0]}:29511", *more]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def _train(world, recipe, folder):
    folder.mkdir(exist_ok=True)
    train(recipe, RunFolder(folder), Silent(), world=world)


@pytest.mark.slow
def test_a_worker_that_dies_on_one_machine_is_started_again_on_both(machines, tmp_path):
    path, run = recipe(tmp_path, steps=12), tmp_path / "run"
    with started([*machines[0], *several(path, 0)]) as first, started([*machines[1], *several(path, 1)]) as second:
        until(lambda: steps_done(run) >= 3, first)
        os.kill(worker(run, 1), signal.SIGKILL)
        (code, out, err), other = finish(first), finish(second)
    assert (code, other) == (0, (0, "", ""))
    assert "a process died: started again, the first time" in err
    assert log(run, 1).count("--- attempt") == 2 and out.startswith("12 steps")
    on_ranks(2, _train, open_recipe(path, ()), tmp_path / "one machine")
    assert adapter(run) == adapter(tmp_path / "one machine")
