"""Checkpoints are written while training goes on, and whoever trains learns what became of them."""

import errno
import threading
from pathlib import Path

import attrs
import pytest
import torch

from quantune.checkpoint.saver import Saver
from quantune.checkpoint.state import OptimizerState, TrainingState, read_state
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import CheckpointError

DEADLINE = 20
"""Seconds after which a thread counts as stuck."""


def state(value):
    optimizer = OptimizerState(kind="AdamW", tensors={}, values={}, groups=[])
    parameters = {"weight": torch.full((4,), float(value))}
    return TrainingState(progress={"step": value}, parameters=parameters, optimizer=optimizer, rng=[], identity={})


@attrs.frozen
class Held(CheckpointStore):
    """A store that waits before it commits."""

    begun: threading.Event = attrs.field(factory=threading.Event)
    go: threading.Event = attrs.field(factory=threading.Event)

    def save(self, step, write):
        self.begun.set()
        assert self.go.wait(DEADLINE)
        return super().save(step, write)


@attrs.frozen
class Broken(CheckpointStore):
    """A store on a disk that fails as it is told to."""

    error: Exception

    def save(self, step, write):
        def fail(folder):
            write(folder)
            raise self.error

        return super().save(step, fail)


class Heard:
    def __init__(self):
        self.committed, self.lost = [], []

    def saver(self, store, **more):
        return Saver(store=store, keep=2, committed=self.committed.append, lost=self.lost.append, **more)


@pytest.fixture
def heard():
    return Heard()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, heard):
    store = Held(tmp_path)
    saver = heard.saver(store)
    saver.save(3, lambda: state(3))
    assert store.begun.wait(DEADLINE)
    assert not saver.failed() and heard.committed == [] and store.steps() == []
    store.go.set()
    saver.finish()
    assert heard.committed == [3] and store.steps() == [3]
    assert read_state(store.path(3)).progress == {"step": 3}


def test_the_next_save_waits_for_the_one_before_it_and_only_then_captures(tmp_path, heard):
    store = Held(tmp_path)
    saver = heard.saver(store)
    saver.save(3, lambda: state(3))
    threading.Timer(0.05, store.go.set).start()
    committed_when_captured = []

    def take():
        committed_when_captured.extend(store.steps())
        return state(5)

    saver.save(5, take)
    saver.finish()
    assert committed_when_captured == [3] and heard.committed == [3, 5]


def test_a_committed_checkpoint_is_told_of_at_the_next_step_and_once(tmp_path, heard):
    saver = heard.saver(CheckpointStore(tmp_path))
    saver.save(3, lambda: state(3))
    saver._save.thread.join(DEADLINE)
    assert not saver.failed() and heard.committed == [3]
    saver.finish()
    assert heard.committed == [3]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "could not be written, the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "or a quota or limit on file sizes is reached"),
        (OSError(errno.EIO, "Input/output error"), "the checkpoint of step 5 could not be written.*Input/output error"),
        (ValueError("a bug"), r"the checkpoint of step 5 could not be written: ValueError\('a bug'\)"),
    ],
)
def test_a_save_that_fails_is_told_of_and_publishes_nothing(tmp_path, heard, error, message):
    CheckpointStore(tmp_path).save(3, lambda folder: (folder / "x").write_text("x"))
    saver = heard.saver(Broken(tmp_path, error))
    saver.save(5, lambda: state(5))
    saver._save.thread.join(DEADLINE)
    assert saver.failed()
    with pytest.raises(CheckpointError, match=message):
        saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"] and heard.committed == []
    saver.finish()  # it was said


def test_a_failure_is_raised_by_the_next_save_too(tmp_path, heard):
    saver = heard.saver(Broken(tmp_path, OSError(errno.ENOSPC, "full")))
    saver.save(5, lambda: state(5))
    with pytest.raises(CheckpointError, match="disk is full"):
        saver.save(6, lambda: pytest.fail("captured although the save before it failed"))


def test_a_run_that_ends_with_an_error_waits_for_its_checkpoint(tmp_path, heard):
    store = Held(tmp_path)
    with pytest.raises(RuntimeError, match="the run's own"), heard.saver(store) as saver:
        saver.save(3, lambda: state(3))
        threading.Timer(0.05, store.go.set).start()
        raise RuntimeError("the run's own")
    assert store.steps() == heard.committed == [3]


def test_a_run_that_ends_with_an_error_says_that_its_checkpoint_was_lost(tmp_path, heard):
    saver = heard.saver(Broken(tmp_path, OSError(errno.ENOSPC, "full")))
    with pytest.raises(RuntimeError, match="the run's own"), saver:
        saver.save(3, lambda: state(3))
        raise RuntimeError("the run's own")
    assert heard.committed == [] and "disk is full" in heard.lost[0]


def test_an_aborted_run_does_not_wait(tmp_path, heard):
    store = Held(tmp_path)
    with pytest.raises(KeyboardInterrupt), heard.saver(store) as saver:
        saver.save(3, lambda: state(3))
        raise KeyboardInterrupt
    assert store.steps() == [] and heard.committed == []
    store.go.set()
    saver.finish()


def test_what_is_to_be_on_the_disk_before_the_checkpoint_is_put_there_first(tmp_path, heard):
    marker = tmp_path / "marker"

    @attrs.frozen
    class Checked(CheckpointStore):
        def save(self, step, write):
            assert marker.exists()
            return super().save(step, write)

    saver = heard.saver(Checked(Path(tmp_path / "checkpoints")), prepare=marker.touch)
    saver.save(3, lambda: state(3))
    saver.finish()
    assert heard.committed == [3]
