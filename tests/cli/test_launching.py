"""Asking for several processes: what makes no sense is refused before anything is started."""

import pytest
from commands import recipe, refused

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
        pytest.param({"count": 2, "rendezvous": "host:0"}, "HOST:PORT, found host:0", id="any port"),
        pytest.param({"count": 2, "rendezvous": "tcp://host:1"}, "HOST:PORT, found tcp://host:1", id="a URL"),
    ],
)
def test_machines_that_can_not_find_each_other_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        Nodes(**given)


@pytest.mark.parametrize("rendezvous", ["10.0.0.1:29500", "quantune-0.quantune:29500", "[fe80::1]:29500"])
def test_a_rendezvous_is_a_name_or_an_address(rendezvous):
    assert Nodes(count=2, rendezvous=rendezvous).rendezvous == rendezvous


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
    assert sentence in refused("run", recipe(tmp_path), *options, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_worker_of_another_launcher_is_not_told_of_machines(tmp_path):
    machines = ["--nodes", "2", "--rendezvous", "host:29500"]
    said = refused("run", recipe(tmp_path), *machines, cwd=tmp_path, RANK="0", WORLD_SIZE="1")
    assert "a launcher has started this process already, as one of 1: leave out --nodes" in said
