"""What becomes of a run of several processes, by what happens to them. The runs are toys: see `toy.py`."""

import os
import signal
import socket
import sys

import pytest
from launching import launched, wait_until

from quantune.distributed.launch import Nodes, local_processes
from quantune.errors import InputError
from quantune.recipe.schema import DistributedConfig

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def test_rank_0_speaks_the_others_write_to_logs_and_nothing_else_is_left(tmp_path):
    run = launched(tmp_path, processes=3, steps=2)
    assert run.ended() == 0
    assert run.said().splitlines() == ["importing", "attempt 0, step 1", "attempt 0, step 2"]
    for rank in (1, 2):
        header, *lines = run.log(rank).splitlines()
        assert header.startswith("--- attempt 0, process ") and lines == run.said().splitlines()
    assert os.listdir(tmp_path / "temporary") == []


def test_a_worker_that_dies_once_too_often_is_named_with_its_signal(tmp_path):
    run = launched(tmp_path, restarts=1, fault={"rank": 1, "step": 2, "do": "die"})
    assert run.ended() == 7 and run.fired() == ["1-0", "1-1"]
    (error,) = run.errors()
    assert error.startswith("error: rank 1 (process ") and "was killed by SIGKILL" in error
    assert "the last of 2 attempts. --resume goes on from the last checkpoint" in error
    assert "attempt 1, step 1" in run.said() and "attempt 1, step 1" in run.log(1)  # all were started again
    assert [line for line in run.log(1).splitlines() if line.startswith("---")][1].startswith("--- attempt 1, ")


@pytest.mark.parametrize(
    ("fault", "exit_code", "said"),
    [
        ({"rank": "all", "step": 2, "do": "data error"}, 2, "error: row 3 has no text"),
        ({"rank": 0, "do": "data error"}, 2, "error: row 3 has no text"),  # the others wait for it to come
        ({"rank": 1, "step": 2, "do": "bug"}, 70, "bug: rank 1: quantune ended on an error that it should have"),
    ],
)
def test_the_first_error_is_shown_once_is_the_exit_code_and_starts_nothing_again(tmp_path, fault, exit_code, said):
    run = launched(tmp_path, restarts=3, fault=fault)
    assert run.ended() == exit_code
    assert all(name.endswith("-0") for name in run.fired()) and run.fired()
    (error,) = run.errors()
    assert error.startswith(said)
    assert run.said().count("Traceback") == (exit_code == 70)
    assert run.workers() == []


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "what"), [("freeze", "has stopped altogether"), ("hang", "has been at")])
def test_a_rank_that_hangs_is_named_and_ended(tmp_path, fault, what):
    run = launched(tmp_path, timeout=5, hurry=5, fault={"rank": 1, "step": 2, "do": fault})
    assert run.ended() == 7 and run.fired() == ["1-0"]
    named, ended = run.errors()
    assert named.startswith("error: rank 1 (process ") and what in named and "the others wait for it" in named
    assert "rank 1" in ended and "was ended because it hung" in ended
    assert run.workers() == []


def test_ctrl_c_lets_all_ranks_agree_on_a_step_and_save(tmp_path):
    run = launched(tmp_path, steps=10_000, seconds=0.05)
    run.wait_for("step 2")
    run.send(signal.SIGINT)
    assert run.ended() == 75
    stopped = {(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)}
    assert len(stopped) == 1
    assert run.errors() == [f"interrupted: stopped after step {stopped.pop()} and saved"]
    assert "Ctrl-C again aborts at once" in run.said()


def test_one_worker_that_is_asked_to_stop_is_enough(tmp_path):
    run = launched(tmp_path, steps=10_000, seconds=0.05, restarts=3, fault={"rank": 1, "step": 2, "do": "be asked"})
    assert run.ended() == 75 and run.fired() == ["1-0"]
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text()


def test_a_run_that_is_asked_to_stop_while_it_imports_stops_before_training(tmp_path):
    run = launched(tmp_path, restarts=3)
    run.wait_for("importing")
    run.send(signal.SIGTERM)
    assert run.ended() == 75
    assert "step 1" not in run.said()
    (error,) = run.errors()
    assert "stopped before training began; nothing had to be saved" in error


def test_a_second_ctrl_c_aborts_at_once_and_leaves_no_process(tmp_path):
    run = launched(tmp_path, steps=10_000, seconds=30.0)
    run.wait_for("importing")
    wait_until(lambda: run.workers() != [], "there were no workers")
    run.send(signal.SIGINT)
    run.wait_for("Ctrl-C again aborts at once")
    run.send(signal.SIGINT)
    assert run.ended() == 130
    assert run.workers() == []
    assert run.said().splitlines()[-1].startswith("aborted:")


def test_workers_end_with_their_launcher(tmp_path):
    run = launched(tmp_path, steps=10_000, seconds=0.05)
    run.wait_for("step 1")
    assert len(run.workers()) == 2
    run.send(signal.SIGKILL)
    assert run.ended() == -signal.SIGKILL
    wait_until(lambda: run.workers() == [], "workers went on without their launcher")


def test_a_launcher_that_waits_for_another_machine_can_be_interrupted(tmp_path):
    run = launched(tmp_path, nodes=Nodes(count=2, rank=0, rendezvous="localhost:29917"))
    wait_until(lambda: _listens(29917), "the launcher did not open its port")
    run.send(signal.SIGINT)
    assert run.ended() == 75
    assert run.errors() == ["interrupted: stopped while waiting for the other machines; the same command goes on"]


def test_a_rendezvous_whose_port_is_in_use_is_said_to_be(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        run = launched(tmp_path, nodes=Nodes(count=2, rank=0, rendezvous=f"127.0.0.1:{port}"))
        assert run.ended() == 7
    (error,) = run.errors()
    assert error.startswith(f"error: the port of 127.0.0.1:{port} is in use on this machine: give all machines another")


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def test_auto_is_one_process_where_there_is_no_gpu():
    assert local_processes(DistributedConfig(), "cpu") == 1
    assert local_processes(DistributedConfig(processes=3), "cpu") == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        pytest.param({"count": 2}, "--nodes needs --rendezvous HOST:PORT", id="no rendezvous"),
        pytest.param({"rank": 1}, "give --nodes as well", id="a rank alone"),
        pytest.param({"rendezvous": "host:29500"}, "give --nodes as well", id="a rendezvous alone"),
        pytest.param({"count": 2, "rank": 2, "rendezvous": "host:29500"}, "from 0 to 1, found 2", id="rank"),
        pytest.param({"count": 2, "rendezvous": "host"}, "HOST:PORT, found host", id="no port"),
        pytest.param({"count": 2, "rendezvous": ":29500"}, "HOST:PORT, found :29500", id="no host"),
        pytest.param({"count": 2, "rendezvous": "host:70000"}, "HOST:PORT, found host:70000", id="port too high"),
        pytest.param({"count": 2, "rendezvous": "host:0"}, "HOST:PORT, found host:0", id="no fixed port"),
        pytest.param({"count": 2, "rendezvous": "tcp://host:1"}, "HOST:PORT, found tcp://host:1", id="a URL"),
    ],
)
def test_machines_that_can_not_find_each_other_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        Nodes(**given)


@pytest.mark.parametrize("rendezvous", ["gpu-01.cluster:29500", "10.0.0.1:1", "[fe80::1]:65535", "node_1:80"])
def test_a_rendezvous_is_a_name_or_an_address(rendezvous):
    assert Nodes(count=2, rendezvous=rendezvous).rendezvous == rendezvous
