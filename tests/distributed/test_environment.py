"""What the environment says of the processes of a run."""

import doctest

import pytest

from quantune.distributed import environment
from quantune.distributed.environment import adopt_slurm, attempt, launched, meeting_point
from quantune.distributed.network import interface_towards
from quantune.distributed.world import World
from quantune.errors import InputError

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007,009]",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def adopted(**changed):
    found = {**STEP, **changed}
    adopt_slurm(found)
    return found


def test_a_process_that_nobody_launched_is_alone():
    assert not launched({}) and attempt({}) == 0 and World.from_environment({}) == World()


def test_machines_may_have_different_numbers_of_tasks():
    assert World.from_environment(adopted()) == World(rank=5, size=7, local_rank=1, local_size=3)


def test_all_tasks_of_a_step_meet_at_one_port_and_other_steps_at_another():
    same = adopted(SLURM_PROCID="0", SLURM_NODEID="0")
    ports = [
        int(one["MASTER_PORT"]) for one in (adopted(), same, adopted(SLURM_STEP_ID="3"), adopted(SLURM_JOB_ID="8"))
    ]
    assert ports[0] == ports[1] and len(set(ports)) == 3 and all(1024 < port < 32_768 for port in ports)


def test_a_meeting_point_that_was_set_stays():
    found = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "here"}, {"MASTER_ADDR": "here", "MASTER_PORT": "x"}])
def test_a_launcher_that_names_no_meeting_point_is_told_so(given):
    with pytest.raises(InputError, match="expected the launcher to say in MASTER_ADDR and MASTER_PORT"):
        meeting_point(given)


def test_the_examples_of_slurms_lists_are_true():
    found = doctest.testmod(environment)
    assert found.attempted and not found.failed


def test_processes_of_one_machine_talk_over_the_loopback():
    assert interface_towards("127.0.0.1", elsewhere=False) == interface_towards("localhost", elsewhere=False) == "lo"


@pytest.mark.parametrize("host", ["127.0.1.1", "localhost", "no.such.host.invalid"])
def test_an_interface_that_does_not_lead_to_other_machines_is_not_chosen(host):
    assert interface_towards(host, elsewhere=True) is None
