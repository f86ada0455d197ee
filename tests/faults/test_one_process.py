"""Whatever happens to a run of one process, it says so, and goes on to the bytes of a run that nothing happened to."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest
from conftest import make_work
from faults import Fault
from running import quantune_run, start

KILLS = 20


def fault(work, kind, place, step=None):
    return Fault(kind=kind, place=place, step=step, proof=work.folder / "fired")


def resumed(work):
    """Let a run go on to its end."""
    done = quantune_run(work.recipe, "--resume-or-start")
    assert done.code == 0, done.said
    return done


@pytest.mark.slow
def test_killed_at_twenty_random_times_a_run_ends_with_the_same_bytes(tmp_path):
    options = ["--set", "training.max_steps=60", "--set", "checkpoint.every_steps=1"]
    whole, work = make_work(tmp_path / "whole"), make_work(tmp_path / "killed")
    assert quantune_run(whole.recipe, *options).code == 0

    chance = random.Random(20)
    recorded = []
    for _ in range(KILLS):
        steps, seconds = work.step() + chance.randint(0, 3), chance.uniform(0.0, 0.1)
        command = start("run", work.recipe, *options, "--resume-or-start", output=work.folder / "out")
        while work.step() < steps:
            time.sleep(0.001)
        time.sleep(seconds)
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.said()
        recorded.append(work.step())
    assert len(set(recorded)) > KILLS / 3, "most of them died before the first step"
    done = quantune_run(work.recipe, *options, "--resume")
    assert done.code == 0, done.said
    assert work.is_as(whole)


@pytest.mark.parametrize(
    ("place", "step"),
    [("loading", None), ("saving", 4), ("evaluation", 5), ("publishing", None)],
)
def test_killed_anywhere_a_run_ends_with_the_same_bytes(work, whole, place, step):
    killed = fault(work, "kill", place, step)
    assert quantune_run(work.recipe, faults=[killed]).code == -signal.SIGKILL
    assert killed.fired()
    assert not (work.run / "adapter").exists()
    resumed(work)
    assert work.is_as(whole)


@pytest.mark.parametrize(
    ("kind", "place", "step"),
    [("terminate", "evaluation", 5), ("interrupt", "step", 3)],
)
def test_asked_to_stop_a_run_saves_and_ends_with_75(work, whole, kind, place, step):
    asked = fault(work, kind, place, step)
    done = quantune_run(work.recipe, faults=[asked])
    assert asked.fired() and done.code == 75, done.said
    assert "stopped after step 5 and saved; --resume goes on from there" in done.said
    assert work.checkpoints()[-1] == 5
    assert json.loads((work.run / "status.json").read_text()) == {"state": "interrupted", "step": 5}
    resumed(work)
    assert work.is_as(whole)


@pytest.mark.parametrize("kind", ["terminate", "interrupt"])
def test_asked_to_stop_while_it_loads_a_run_ends_at_once_with_75(work, kind):
    asked = fault(work, kind, "loading")
    done = quantune_run(work.recipe, faults=[asked])
    assert asked.fired() and done.code == 75, done.said
    assert "stopped before training began; nothing had to be saved, the same command begins where this did" in done.said
    assert sorted(path.name for path in work.run.iterdir()) == [".lock"]


def test_interrupted_twice_a_run_ends_at_once_with_130_even_while_it_saves(work, whole):
    asked = fault(work, "interrupt twice", "saving", 4)
    done = quantune_run(work.recipe, faults=[asked])
    assert asked.fired() and done.code == 130, done.said
    assert "Traceback" not in done.said
    resumed(work)
    assert work.is_as(whole) and not work.leftovers()


def test_a_clock_that_jumps_changes_nothing(work, whole):
    jump = fault(work, "clock", "loading")
    killed = Fault(kind="kill", place="saving", step=8, proof=work.folder / "killed")
    assert quantune_run(work.recipe, faults=[jump, killed]).code == -signal.SIGKILL
    assert jump.fired() and killed.fired()
    again = Fault(kind="clock", place="loading", proof=work.folder / "again")
    done = quantune_run(work.recipe, "--resume", faults=[again])
    assert done.code == 0 and again.fired(), done.said
    assert "resuming from step-00000006" in done.said
    assert work.is_as(whole)


def test_a_loss_that_is_not_a_number_ends_with_4_and_is_not_saved(work):
    nan = fault(work, "nan", "step", 5)
    done = quantune_run(work.recipe, faults=[nan])
    assert nan.fired() and done.code == 4
    assert "the loss of step 6 is nan; nothing was updated with it. The samples were train.jsonl:" in done.said
    assert work.checkpoints() == [2, 4]


def test_an_error_nobody_foresaw_ends_with_70_and_says_how_to_report_it(work):
    error = fault(work, "error", "step", 5)
    done = quantune_run(work.recipe, faults=[error])
    assert error.fired() and done.code == 70
    assert done.said.count("injected on rank 0") == 2 and "Please report it" in done.said  # traceback and sentence


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that died while it wrote the checkpoint of step 10, with those of steps 6 and 8."""
    work = make_work(tmp_path_factory.mktemp("begun"))
    killed = fault(work, "kill", "saving", 10)
    assert quantune_run(work.recipe, faults=[killed]).code == -signal.SIGKILL
    assert killed.fired() and work.checkpoints() == [6, 8]
    return work


@pytest.fixture
def interrupted(begun, work):
    """A copy of it."""
    shutil.copytree(begun.run, work.run)
    return work


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "said"), [(flip, "is damaged"), (truncate, "bytes, expected"), (lambda path: path.unlink(), "is missing")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(interrupted, whole, harm, said):
    harm(interrupted.run / "checkpoints" / "step-00000008" / "optimizer.safetensors")
    done = resumed(interrupted)
    assert "warning: step-00000008/optimizer.safetensors" in done.said and said in done.said
    assert "falling back to step-00000006" in done.said and "resuming from step-00000006" in done.said
    assert interrupted.is_as(whole)


def test_when_all_checkpoints_are_damaged_the_run_ends_with_5_and_says_what_is_left_to_do(interrupted):
    for step in interrupted.checkpoints():
        flip(interrupted.run / "checkpoints" / f"step-{step:08d}" / "state.json")
    done = quantune_run(interrupted.recipe, "--resume")
    assert done.code == 5
    assert "step-00000006/state.json" in done.said and "step-00000008/state.json" in done.said
    assert "--overwrite starts the run again" in done.said


def test_data_that_changed_between_two_runs_is_refused_by_name(interrupted, whole):
    data = interrupted.folder / "train.jsonl"
    before = data.read_text()
    data.write_text(before.replace("The number after 7", "The number behind 7"))
    done = quantune_run(interrupted.recipe, "--resume")
    assert done.code == 2, done.said
    assert "train.jsonl of data.train[0] was sha256" in done.said
    data.write_text(before)
    resumed(interrupted)
    assert interrupted.is_as(whole)


def test_a_second_run_in_the_same_folder_is_refused_at_once_and_told_by_whom(work, whole):
    stopped = fault(work, "stop", "step", 3)
    first = start("run", work.recipe, output=work.folder / "first.out", faults=[stopped])
    deadline = time.monotonic() + 30
    while not stopped.fired() and time.monotonic() < deadline:
        time.sleep(0.01)
    for options in ([], ["--resume"], ["--overwrite"]):
        begun = time.monotonic()
        second = quantune_run(work.recipe, *options)
        assert second.code == 6, second.said
        assert f"is in use by process {first.process} on " in second.said
        assert "opening the base" not in second.said and time.monotonic() - begun < 5
    first.send(signal.SIGCONT)
    assert first.end().code == 0
    assert work.is_as(whole)
