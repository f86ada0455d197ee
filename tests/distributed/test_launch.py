"""Starting the processes of a run: what is refused, and what a person sees and gets back."""

import json
import os
import signal
import socket
import time

import pytest
from commands import refused
from launching import QUANTUNE, TORCHRUN, alive, finish, log, ran, recipe, started, steps_done, until, worker

from quantune.distributed.launch import Nodes, local_processes
from quantune.errors import InputError
from quantune.recipe.schema import DistributedConfig


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--processes", "0"], "[distributed.processes]"),
        (["--processes", "two"], "[distributed.processes]"),
        (["--processes", "2", "--nodes", "2"], "--nodes needs --rendezvous HOST:PORT"),
        (["--nodes", "0"], "--nodes"),
    ],
)
def test_what_makes_no_world_is_refused_before_anything_is_started(tmp_path, options, sentence):
    assert sentence in refused("run", str(recipe(tmp_path)), *options)
    assert not (tmp_path / "run").exists()


def test_a_launched_process_is_not_told_of_machines(tmp_path):
    machines = ["--nodes", "2", "--rendezvous", "host:29500"]
    said = refused("run", str(recipe(tmp_path)), *machines, RANK="0", WORLD_SIZE="1")
    assert "a launcher has started this process already" in said


@pytest.mark.slow
def test_rank_0_speaks_and_the_others_have_logs(tmp_path):
    code, out, err = ran(*QUANTUNE, "run", recipe(tmp_path), "--processes", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 4
    assert err.count("step 1/4") == 1 and "shared by 2 processes" in err
    assert log(tmp_path / "run", 1).startswith("--- attempt 0, process ")


@pytest.mark.slow
def test_torchrun_and_srun_start_the_same_run(tmp_path):
    path, run = recipe(tmp_path, processes=3), tmp_path / "run"
    code, out, err = ran(*TORCHRUN, "--nproc-per-node", 2, "-m", "quantune", "run", path)
    assert code == 0 and out.startswith("4 steps"), err
    assert "[distributed] processes = 3 has no effect: the launcher started 2 here" in err
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    (code, out, err), other = srun(path, "--overwrite")
    assert code == 0 and out.startswith("4 steps"), err
    assert other == (0, "", "") and (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def srun(path, *options):
    """What both tasks of a step give back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [{**step, "MASTER_PORT": str(port), "SLURM_NODEID": "0"} for _ in range(2)]
    for rank, task in enumerate(tasks):
        task.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    command = [*QUANTUNE, "run", path, *options]
    with started(command, tasks[0]) as first, started(command, tasks[1]) as second:
        return finish(first), finish(second)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["quantune", "srun"])
def test_an_error_on_one_rank_is_said_once_with_its_rank_and_is_not_tried_again(tmp_path, launcher):
    """Rank 1 can't write its log, before the ranks have met."""
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir(parents=True)
    path = recipe(tmp_path)
    ends = [ran(*QUANTUNE, "run", path, "--processes", 2)] if launcher == "quantune" else srun(path)
    said = "".join(err for _, _, err in ends)
    assert [code for code, _, _ in ends] == [1] * len(ends)
    assert said.count("error:") == 1 and "error: rank 1: " in said and "rank-1.log: Is a directory" in said
    assert "Traceback" not in said and "started again" not in said


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_ranks_at_one_step(tmp_path):
    run = tmp_path / "run"
    with started([*QUANTUNE, "run", recipe(tmp_path, steps=2000), "--processes", 2]) as launcher:
        until(lambda: steps_done(run) >= 2, launcher)
        workers = [worker(run, rank) for rank in (0, 1)]
        launcher.send_signal(signal.SIGTERM)
        code, _, err = finish(launcher)
    assert code == 75 and err.count("interrupted:") == 1, err
    assert json.loads((run / "status.json").read_text()) == {"state": "interrupted", "step": steps_done(run)}
    assert not any(alive(process) for process in workers)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["its launcher is killed", "Ctrl-C twice"])
def test_no_worker_is_left_when(tmp_path, how):
    run = tmp_path / "run"
    with started([*QUANTUNE, "run", recipe(tmp_path, steps=2000), "--processes", 2]) as launcher:
        until(lambda: steps_done(run) >= 1, launcher)
        workers = [worker(run, rank) for rank in (0, 1)]
        assert all(alive(process) for process in workers)
        if how == "Ctrl-C twice":
            os.kill(workers[1], signal.SIGSTOP)  # or the ranks would have agreed on a step to stop at by then
            launcher.send_signal(signal.SIGINT)
            time.sleep(0.5)
            launcher.send_signal(signal.SIGINT)
        else:
            launcher.kill()
        code, _, err = finish(launcher)
    assert code == (130 if how == "Ctrl-C twice" else -signal.SIGKILL), err
    assert how != "Ctrl-C twice" or err.splitlines()[-1] == "aborted"
    begun = time.monotonic()
    while any(alive(process) for process in workers):
        assert time.monotonic() - begun < 10
        time.sleep(0.05)
