"""Runs on two machines: network namespaces on this one, with a cable between them."""

import ctypes
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from launching import launched, wait_until

from quantune.distributed.launch import Nodes

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
RENDEZVOUS = "10.99.0.1:29500"
SETUP = """
set -e
ip link set lo up
ip link add cable0 type veth peer name cable1 netns {peer}
ip addr add 10.99.0.1/24 dev cable0
ip link set cable0 up
nsenter --target {peer} --net ip link set lo up
nsenter --target {peer} --net ip addr add 10.99.0.2/24 dev cable1
nsenter --target {peer} --net ip link set cable1 up
"""


@pytest.fixture
def machines():
    """Processes that hold the namespaces of two machines open."""
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux'")
    first = subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sleep", "1000"])
    within = ["nsenter", "--target", str(first.pid), "--user", "--net", "--preserve-credentials"]
    holders = [first]
    try:
        _require(lambda: _has_own_network(first.pid), "this system allows no network namespaces")
        second = subprocess.Popen([*within, "unshare", "--net", "sleep", "1000"])
        holders.append(second)
        _require(lambda: _has_own_network(second.pid, first.pid), "this system allows no second network namespace")
        done = subprocess.run(
            [*within, "sh", "-c", SETUP.format(peer=second.pid)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this system allows no virtual cable: {done.stderr.strip()}")
        yield [holder.pid for holder in holders]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _has_own_network(process, *others):
    networks = {os.stat(f"/proc/{one}/ns/net").st_ino for one in ("self", *others)}
    return os.stat(f"/proc/{process}/ns/net").st_ino not in networks


def _require(holds, otherwise):
    try:
        wait_until(holds, otherwise, patience=30)
    except (AssertionError, OSError):
        pytest.skip(otherwise)


def move_to(holder):
    """Have this process on a machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "net"):
        with open(f"/proc/{holder}/ns/{kind}") as namespace:
            assert libc.setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


def launched_on(machines, folder, first=0, **toy):
    """The same command on each machine, all with one folder, as on a file system that they share."""
    runs = []
    for rank, holder in enumerate(machines, first):
        nodes = Nodes(count=2, rank=rank, rendezvous=RENDEZVOUS)
        output = f"output-{rank}"
        runs.append(launched(folder, processes=1, nodes=nodes, output=output, begin=partial(move_to, holder), **toy))
    return runs


@pytest.mark.slow
def test_two_machines_train_together_and_start_again_together(machines, tmp_path):
    fault = {"rank": 1, "step": 2, "do": "die", "attempts": 1}
    first, second = launched_on(machines, tmp_path, steps=3, restarts=1, fault=fault)
    assert (first.ended(), second.ended()) == (0, 0)
    assert first.fired() == ["1-0"]
    assert "attempt 1, step 3" in first.said() and "attempt 1, step 3" in first.log(1)
    assert "step" not in second.said()  # rank 0 speaks, on the first machine


def test_a_worker_that_dies_before_the_machines_have_met_is_started_again_on_both(machines, tmp_path):
    """Nothing breaks on the other machine, which waits for it."""
    first, second = launched_on(machines, tmp_path, steps=1, restarts=1, fault={"rank": 1, "do": "die", "attempts": 1})
    assert (first.ended(), second.ended()) == (0, 0)
    assert first.fired() == ["1-0"] and "attempt 1, step 1" in first.said()


@pytest.mark.slow
def test_a_machine_that_is_gone_can_be_replaced_while_the_other_waits(machines, tmp_path):
    toy = {"steps": 40, "seconds": 0.05, "restarts": 2}
    first, second = launched_on(machines, tmp_path, **toy)
    first.wait_for("step 3")
    second.send(signal.SIGKILL)
    assert second.ended() == -signal.SIGKILL
    wait_until(lambda: first.said().count("importing") == 2, "the first machine did not start again")
    (another,) = launched_on(machines[1:], tmp_path, first=1, **toy)
    assert (first.ended(), another.ended()) == (0, 0)
    assert "attempt 1, step 40" in first.said() and "attempt 0, step 40" not in first.said()


def test_an_error_on_one_machine_ends_the_run_on_both(machines, tmp_path):
    fault = {"rank": 1, "step": 2, "do": "not finite"}
    first, second = launched_on(machines, tmp_path, steps=3, restarts=1, fault=fault)
    assert (first.ended(), second.ended()) == (4, 4)
    assert first.fired() == ["1-0"]
    assert first.errors() == [] and second.errors() == ["error: rank 1: the loss is NaN"]
