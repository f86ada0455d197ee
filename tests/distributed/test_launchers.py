"""Runs that torchrun or srun starts. The runs are toys: see `toy.py`."""

import json
import os
import socket
import subprocess
import sys

import pytest
from launching import PATIENCE, TOY

from quantune.distributed.environment import adopt_slurm


def slurm(rank, size, **others):
    """What srun tells a task."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_STEP_NODELIST": "localhost",
        **others,
    }


def under_srun(folder, size, **toy):
    """Start a toy run's processes as srun would; returns their exit codes, and what rank 0 and the others said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, TOY, json.dumps(toy)],
            cwd=folder,
            env={**os.environ, **slurm(rank, size, MASTER_PORT=port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [process.returncode for process in processes], said


def test_tasks_of_srun_find_each_other(tmp_path):
    codes, said = under_srun(tmp_path, 2, steps=2)
    assert codes == [0, 0]
    assert "step 2" in said[0] and said[1] == ""


def test_tasks_of_srun_end_with_the_exit_code_of_an_error_of_rank_0_which_they_were_to_meet_at(tmp_path):
    codes, said = under_srun(tmp_path, 2, fault={"rank": 0, "do": "data error"})
    assert codes == [2, 2]
    assert said[0].count("error: row 3 has no text") == 1 and said[1] == ""


@pytest.mark.slow
def test_torchrun_starts_the_processes_itself(tmp_path):
    fault = {"rank": 1, "step": 2, "do": "die", "attempts": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", TOY]
    done = subprocess.run(
        [*map(str, command), json.dumps({"steps": 3, "fault": fault})],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fired-1-0").exists() and "attempt 1, step 3" in done.stderr


def test_a_task_that_sees_its_own_gpu_alone_takes_the_first():
    environment = slurm(1, 2, CUDA_VISIBLE_DEVICES="3")
    adopt_slurm(environment)
    assert environment["LOCAL_RANK"] == "0" and environment["RANK"] == "1"
