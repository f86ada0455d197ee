"""What launchers say of the processes of a run."""

import doctest

import pytest

from quantune.distributed import environment
from quantune.distributed.environment import adopt_slurm, attempt, launched, launcher_has_store, meeting_point
from quantune.distributed.network import interface_towards
from quantune.distributed.world import World
from quantune.errors import InputError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007,009]",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_a_process_that_nobody_launched_is_alone():
    assert not launched({}) and attempt({}) == 0 and World.from_environment({}) == World()


def test_srun_says_which_of_the_tasks_a_process_is():
    found = dict(SRUN)
    adopt_slurm(found)
    assert World.from_environment(found) == World(rank=5, size=7, local_rank=1, local_size=3)
    assert meeting_point(found)[0] == "gpu007" and not launcher_has_store(found)


def test_all_tasks_of_a_step_meet_at_one_port_and_steps_at_different_ones():
    ports = []
    for changed in ({}, {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, {"SLURM_STEP_ID": "3"}, {"SLURM_JOB_ID": "4712"}):
        found = {**SRUN, **changed}
        adopt_slurm(found)
        ports.append(meeting_point(found)[1])
    assert ports[0] == ports[1] and len(set(ports)) == 3 and all(1024 < port < 32_768 for port in ports)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"SLURM_STEP_NUM_TASKS": "1"}, id="one task"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "2"}, id="torchrun in a task of srun"),
    ],
)
def test_what_srun_says_is_left_alone_where_it_is_not_the_launcher(changed):
    found = {**SRUN, **changed}
    adopt_slurm(found)
    assert found == {**SRUN, **changed}


def test_an_allocation_without_srun_is_no_world():
    found = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}
    adopt_slurm(found)
    assert not launched(found)


def test_a_meeting_point_that_was_set_stays():
    found = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(found)
    assert meeting_point(found) == ("10.0.0.1", 29500)


def test_srun_that_does_not_name_its_nodes_is_told_what_to_set():
    with pytest.raises(InputError, match="set MASTER_ADDR"):
        adopt_slurm({**SRUN, "SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "here"}, {"MASTER_ADDR": "here", "MASTER_PORT": "x"}])
def test_a_launcher_that_names_no_meeting_point_is_told_so(given):
    with pytest.raises(InputError, match="expected the launcher to say in MASTER_ADDR and MASTER_PORT"):
        meeting_point(given)


def test_the_examples_of_slurm_lists_are_true():
    assert doctest.testmod(environment).failed == 0


def test_processes_of_one_machine_talk_over_the_loopback():
    assert interface_towards("127.0.0.1", elsewhere=False) == interface_towards("localhost", elsewhere=False) == "lo"


@pytest.mark.parametrize("host", ["127.0.1.1", "localhost", "no.such.host.invalid"])
def test_an_interface_that_does_not_lead_to_other_machines_is_not_chosen(host):
    assert interface_towards(host, elsewhere=True) is None
