"""A disk that is full or can't be written: said so, what was saved stays, and the run goes on when there is room."""

from __future__ import annotations

import resource
import signal

from conftest import make_work
from disks import in_own_mounts, mount_read_only, mount_small
from faults import FILLER, Fault
from running import quantune_run


def filling(work, place, step=None):
    return Fault(kind="fill", place=place, step=step, disk=work.run, proof=work.folder / "fired")


def fails_and_goes_on(work, fault, *options, code, said):
    """Let the disk fill up in a run, make room, and let it go on."""
    mount_small(work.run, "16m")
    done = quantune_run(work.recipe, *options, faults=[fault])
    assert fault.fired() and done.code == code, done.said
    assert said in done.said and "Traceback" not in done.said
    assert not work.leftovers()
    (work.run / FILLER).unlink()
    resumed = quantune_run(work.recipe, *options, "--resume")
    assert resumed.code == 0, resumed.said
    assert "falling back" not in resumed.said


def test_a_disk_that_fills_up_before_a_checkpoint(work, whole):
    def body():
        fails_and_goes_on(
            work, filling(work, "step", 3), code=5, said="step-00000004 could not be written, the disk is full"
        )
        assert work.is_as(whole)

    in_own_mounts(body)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(work, whole):
    def body():
        fails_and_goes_on(
            work, filling(work, "saving", 4), code=5, said="step-00000004 could not be written, the disk is full"
        )
        assert work.is_as(whole)

    in_own_mounts(body)


def test_a_disk_that_fills_up_while_the_adapter_is_written(work, whole):
    def body():
        fails_and_goes_on(
            work, filling(work, "publishing"), code=5, said="adapter could not be written, the disk is full"
        )
        assert work.is_as(whole)

    in_own_mounts(body)


def test_a_disk_that_has_no_room_for_the_metrics(tmp_path):
    options = ["--set", "training.max_steps=24", "--set", "checkpoint.every_steps=12"]
    whole, work = make_work(tmp_path / "whole"), make_work(tmp_path / "full")
    assert quantune_run(whole.recipe, *options).code == 0

    def body():
        fails_and_goes_on(
            work,
            filling(work, "step", 12),
            *options,
            code=1,
            said="can't be written: No space left on device",
        )
        assert work.is_as(whole)

    in_own_mounts(body)


def test_a_disk_that_has_no_room_for_anything(work, whole):
    def body():
        mount_small(work.run, "8k")
        done = quantune_run(work.recipe)
        assert done.code == 1 and "can't be written: No space left on device" in done.said, done.said
        mount_small(work.run, "16m")
        assert quantune_run(work.recipe, "--resume-or-start").code == 0
        assert work.is_as(whole)

    in_own_mounts(body)


def test_a_file_that_is_larger_than_the_system_allows(work, whole):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python starts; then a write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))  # the optimizer's file is larger

    done = quantune_run(work.recipe, before=limit)
    assert done.code == 5, done.said
    assert "step-00000002 could not be written, the disk is full" in done.said
    assert "or a quota or limit on file sizes is reached" in done.said
    assert not work.leftovers()
    assert quantune_run(work.recipe, "--resume-or-start").code == 0
    assert work.is_as(whole)


def test_an_output_that_is_read_only_is_found_before_anything_is_loaded(work):
    def body():
        work.run.mkdir()
        mount_read_only(work.run)
        done = quantune_run(work.recipe)
        assert done.code == 2, done.said
        assert f"the run folder {work.run} can't be written to: Read-only file system" in done.said
        assert "importing torch" not in done.said

    in_own_mounts(body)
