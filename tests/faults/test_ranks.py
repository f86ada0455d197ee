"""What happens to one rank of several: all of them know, one says so, and the run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import make_work
from faults import Fault
from running import quantune_ranks, quantune_run, ranks

from quantune.distributed import watch

FOLDER = Path(__file__).parent


def fault(work, kind, place, step=None, rank=1):
    return Fault(kind=kind, place=place, step=step, rank=rank, proof=work.folder / "fired")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two ranks, to which nothing happened."""
    work = make_work(tmp_path_factory.mktemp("whole"))
    done = quantune_ranks(2, work.recipe)
    assert [one.code for one in done] == [0, 0], done
    return work


def goes_on(work, whole):
    """Whether the run ends as if nothing had happened."""
    done = quantune_ranks(2, work.recipe, "--resume-or-start")
    assert [one.code for one in done] == [0, 0], done
    assert work.is_as(whole)


def test_a_loss_that_is_not_a_number_on_one_rank_ends_all_with_4(work):
    nan = fault(work, "nan", "step", 5)
    done = quantune_ranks(2, work.recipe, faults=[nan])
    assert nan.fired() and [one.code for one in done] == [4, 4], done
    said = "".join(one.said for one in done)
    assert said.count("the loss of step 6 is nan on rank 1; nothing was updated with it") == 1
    assert "Traceback" not in said


def test_an_error_on_one_rank_is_shown_once_with_its_rank(work):
    error = fault(work, "error", "step", 5)
    done = quantune_ranks(2, work.recipe, faults=[error])
    assert error.fired() and [one.code for one in done] == [70, 70], done
    said = "".join(one.said for one in done)
    assert said.count("Traceback") == 1 and said.count("Please report it") == 1
    assert "rank 1: " in said and "injected on rank 1" in said


def test_all_ranks_stop_after_the_same_step_when_one_is_asked_to_while_it_evaluates(work, whole):
    asked = fault(work, "terminate", "evaluation", 5)
    done = quantune_ranks(2, work.recipe, faults=[asked])
    assert asked.fired() and [one.code for one in done] == [75, 75], done
    assert "stopped after step 5 and saved" in "".join(one.said for one in done)
    assert json.loads((work.run / "status.json").read_text()) == {"state": "interrupted", "step": 5}
    goes_on(work, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_the_others_end_and_the_run_can_go_on(work, whole, rank):
    killed = fault(work, "kill", "step", 5, rank)
    done = quantune_ranks(2, work.recipe, faults=[killed])
    assert killed.fired()
    assert done[rank].code == -signal.SIGKILL and done[1 - rank].code == 7, done
    if rank:  # what is on the disk does not depend on who died
        goes_on(work, whole)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_place_where_it_is(work, monkeypatch):
    for name in ("INTERVAL", "STALE", "GRACE"):
        monkeypatch.setattr(watch, name, getattr(watch, name) / 5)
    hung = fault(work, "hang", "step", 5)
    with ranks(2, work.recipe, "--set", "distributed.timeout=5", faults=[hung]) as commands:
        done = [command.end() for command in commands]
    assert hung.fired() and [one.code for one in done] == [7, 7], done
    said = "".join(one.said for one in done)  # whoever found out first
    assert said.count(f"rank 1 (process {commands[1].process} on ") == 1 and "the others wait for it" in said
    assert "while training, after step 5" in said


@pytest.mark.slow
def test_the_launcher_starts_all_again_when_a_worker_is_killed_and_the_run_ends_with_the_same_bytes(work, whole):
    killed = fault(work, "kill", "step", 5)
    path = os.pathsep.join([str(FOLDER / "injected"), *sys.path])
    more = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    done = quantune_run(work.recipe, "--processes", "2", faults=[killed], **more)  # its workers are new processes
    assert killed.fired() and done.code == 0, done.said
    assert "a process of the run died: this is attempt 2" in done.said
    assert work.is_as(whole)
