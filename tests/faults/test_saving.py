"""A save that dies at any point, or loses power there, leaves the old or the new one whole, and the next save works."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from crashes import count_points, killed, torn
from power import after_power_loss, build, recorded
from torch import nn

from quantune.checkpoint.commit import MANIFEST, REPLACED, TEMPORARY, verify, write_committed, write_file_atomically
from quantune.checkpoint.run_folder import RunFolder
from quantune.checkpoint.saver import Saver
from quantune.checkpoint.state import TrainingState, capture, restore, write_state
from quantune.checkpoint.store import CheckpointStore

SIZES = (0, 200, 500, 5000)
"""Where writes are torn: at once, and within the adapter's tensors, the optimizer's and the state."""


class Run:
    """A layer and its optimizer, all of whose weights and moments are one number."""

    def __init__(self, number: int = 0) -> None:
        layer = nn.Linear(8, 8)
        self.parameters = dict(layer.named_parameters())
        self.optimizer = torch.optim.AdamW(layer.parameters())
        for parameter in self.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.number = number
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(number)

    def tensors(self) -> list[torch.Tensor]:
        return [t for p in self.parameters.values() for t in (p, self.optimizer.state[p]["exp_avg"])]

    def state(self) -> TrainingState:
        state = capture(**self.named(), progress={"step": self.number}, identity={})
        assert state is not None
        return state

    def write(self, folder: Path) -> None:
        write_state(folder, self.state())

    def read(self, folder: Path) -> int:
        """The number that all of a checkpoint agrees on."""
        step = restore(folder, **self.named())["step"]
        assert all(bool((tensor == step).all()) for tensor in self.tensors())
        return step

    def named(self) -> dict:
        return {"parameters": self.parameters, "optimizer": self.optimizer}


@attrs.frozen(kw_only=True)
class Writer:
    """Something that writes into a folder, where 1 was written before."""

    prepare: Callable[[Path], None]
    write: Callable[[Path, int], None]
    """Write a number."""
    read: Callable[[Path], int]
    """The number that is there; any exception when nothing whole is."""


def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root / "checkpoints")


def save(root: Path, step: int, number: int) -> None:
    store(root).save(step, Run(number).write)


def latest(root: Path) -> int:
    folder = store(root).latest_verified(pytest.fail)
    assert folder is not None, f"no checkpoint among {sorted(os.listdir(root / 'checkpoints'))}"
    return Run().read(folder)


def prune(root: Path, number: int) -> None:
    """Keep two of three, after which there may be more to save."""
    save(root, number + 2, number)
    store(root).prune(2)


def two_whole(root: Path) -> int:
    """The latest number, if the two latest checkpoints are whole."""
    for step in store(root).steps()[-2:]:
        verify(store(root).path(step))
    return latest(root)


def publish(root: Path, number: int) -> None:
    """As a run publishes its adapter."""
    write_committed(root, "adapter", Run(number).write, replace=True)


def published(root: Path) -> int:
    """The adapter, or the one that it was about to replace."""
    folder = root / "adapter"
    folder = folder if folder.is_dir() else root / f"adapter{REPLACED}"
    verify(folder)
    return Run().read(folder)


NEXT = Writer(
    prepare=lambda root: save(root, 10, 1),
    write=lambda root, number: save(root, 10 * number, number),
    read=latest,
)


def record_and_save(root: Path, number: int) -> None:
    """As a run does: a step, its row and its event, and the checkpoint after it."""
    folder = RunFolder(root)
    folder.history.append("step", step=number)
    folder.metrics.append({"event": "step", "step": number})

    def flush() -> None:
        folder.history.flush()
        folder.metrics.flush()

    saver = Saver(store=folder.checkpoints, keep=2, committed=lambda step: None, lost=pytest.fail, prepare=flush)
    saver.save(number, Run(number).state)
    saver.finish()


def recorded_and_saved(root: Path) -> int:
    """The latest checkpoint, if what led to it is recorded."""
    number = latest(root)
    folder = RunFolder(root)
    for rows in (folder.history.rows(), folder.metrics.rows()):
        assert {row["step"] for row in rows} >= {1, number}, rows
    return number


WRITERS = {
    "a step and its checkpoint": Writer(
        prepare=lambda root: record_and_save(root, 1), write=record_and_save, read=recorded_and_saved
    ),
    "the next checkpoint": NEXT,
    "the first checkpoint": Writer(
        prepare=lambda root: None,
        write=lambda root, number: save(root, 10 * number, number),
        read=lambda root: latest(root) if store(root).steps() else 1,
    ),
    "a checkpoint in the place of the only one": Writer(
        prepare=lambda root: save(root, 10, 1),
        write=lambda root, number: save(root, 10, number),
        read=latest,
    ),
    "a checkpoint, and removing what is old": Writer(
        prepare=lambda root: [save(root, step, 1) for step in (1, 2, 3)],
        write=prune,
        read=two_whole,
    ),
    "the adapter again": Writer(prepare=lambda root: publish(root, 1), write=publish, read=published),
    "a file": Writer(
        prepare=lambda root: write_file_atomically(root / "status.json", "[1]"),
        write=lambda root, number: write_file_atomically(root / "status.json", f"[{number}]"),
        read=lambda root: json.loads((root / "status.json").read_text())[0],
    ),
}


def save_in_place(root: Path, number: int) -> None:
    """What the protocol is there to avoid: the folder has its name before it is whole."""
    folder = store(root).path(10 * number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text('{"files": {}}')
    Run(number).write(folder)


def save_unflushed(root: Path, number: int) -> None:
    """A temporary folder and a rename, and nothing is flushed."""
    aside = root / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    Run(number).write(aside)
    (aside / MANIFEST).write_text('{"files": {}}')
    os.rename(aside, store(root).path(10 * number))


def save_with_dcp(root: Path, number: int) -> None:
    """As trainers do that give every checkpoint the same name."""
    dcp.save({"weight": torch.full((64,), float(number))}, checkpoint_id=root / "latest", no_dist=True)


def read_with_dcp(root: Path) -> int:
    read = {"weight": torch.zeros(64)}
    try:
        dcp.load(read, checkpoint_id=root / "latest", no_dist=True)
    except dcp.api.CheckpointException as error:  # no Exception
        raise ValueError("not a checkpoint") from error
    assert bool((read["weight"] == read["weight"][0]).all())
    return int(read["weight"][0])


NAIVE = {
    "in its place": Writer(prepare=lambda root: save(root, 10, 1), write=save_in_place, read=latest),
    "with torch.distributed.checkpoint": Writer(
        prepare=lambda root: save_with_dcp(root, 1), write=save_with_dcp, read=read_with_dcp
    ),
}
UNFLUSHED = Writer(prepare=lambda root: save(root, 10, 1), write=save_unflushed, read=latest)


@attrs.frozen
class Outcome:
    """What the deaths of a writer left."""

    deaths: int
    found: set[int]
    broken: list[str]
    """Where nothing whole was left, or the next write failed, and why."""


def after_deaths(writer: Writer, folder: Path, die: Callable[[int, Callable[[], object]], bool] = killed) -> Outcome:
    """Let `writer` die at each of its points, as `die(number, action)` does."""
    writer.prepare(make(folder / "before"))
    shutil.copytree(folder / "before", folder / "counted")
    points = count_points(lambda: writer.write(folder / "counted", 2))
    deaths, found, broken = 0, set(), []
    for number in range(1, points + 1):
        root = folder / str(number)
        shutil.copytree(folder / "before", root)
        deaths += die(number, lambda root=root: writer.write(root, 2))
        look(writer, root, f"point {number} of {points}", found, broken)
    return Outcome(deaths, found, broken)


def after_power_losses(writer: Writer, folder: Path, *, finished: bool = False) -> Outcome:
    """Let the power fail at each of the points of `writer`, in every way; with `finished`, only when it is done."""
    writer.prepare(make(folder / "root"))
    moments = recorded(folder / "root", lambda: writer.write(folder / "root", 2))
    found, broken, count = set(), [], 0
    for count, tree in enumerate(after_power_loss(moments, len(moments) - 1 if finished else 0), start=1):
        build(folder / str(count), tree)
        look(writer, folder / str(count), f"{sorted(tree)}", found, broken)
    return Outcome(count, found, broken)


def look(writer: Writer, root: Path, where: str, found: set[int], broken: list[str]) -> None:
    """Read what is there, and see whether the next write succeeds."""
    try:
        found.add(writer.read(root))
        writer.write(root, 3)
        assert writer.read(root) == 3
    except (Exception, pytest.fail.Exception) as error:
        broken.append(f"{where}: {error!r}")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_any_point_the_old_or_the_new_is_whole(tmp_path, name):
    outcome = after_deaths(WRITERS[name], tmp_path)
    assert outcome.broken == []
    assert outcome.found == {1, 2} and outcome.deaths >= 5


@pytest.mark.parametrize("size", SIZES)
def test_killed_within_any_write_the_old_is_whole(tmp_path, size):
    outcome = after_deaths(NEXT, tmp_path, lambda number, action: torn(number, size, action))
    assert outcome.broken == []
    assert outcome.deaths >= 2


@pytest.mark.parametrize("name", WRITERS)
def test_after_a_power_loss_at_any_point_the_old_or_the_new_is_whole(tmp_path, name):
    outcome = after_power_losses(WRITERS[name], tmp_path)
    assert outcome.broken == []
    assert outcome.found == {1, 2}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_saved_is_not_lost_in_a_power_loss_after_it(tmp_path, name):
    outcome = after_power_losses(WRITERS[name], tmp_path, finished=True)
    assert outcome.broken == []
    assert outcome.found == {2} and outcome.deaths >= 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that it writes over a checkpoint
@pytest.mark.parametrize("naive", NAIVE)
def test_a_naive_writer_fails_the_same_tests(tmp_path, naive):
    assert after_deaths(NAIVE[naive], make(tmp_path / "killed"), killed).broken
    assert after_power_losses(NAIVE[naive], make(tmp_path / "power")).broken


def test_a_writer_that_flushes_nothing_survives_being_killed_and_no_power_loss(tmp_path):
    assert after_deaths(UNFLUSHED, make(tmp_path / "killed"), killed).broken == []
    assert after_power_losses(UNFLUSHED, make(tmp_path / "power")).broken


def test_what_a_dead_save_left_is_no_checkpoint_and_is_pruned(tmp_path):
    save(tmp_path, 10, 1)
    left = []
    for number in itertools.count(1):
        if not killed(number, lambda: save(tmp_path, 20, 2)):
            break
        if any(TEMPORARY in path.name for path in store(tmp_path).folder.iterdir()):
            left.append(number)
            assert store(tmp_path).steps() in ([10], [10, 20])
            store(tmp_path).prune(2)
            assert not any(TEMPORARY in path.name for path in store(tmp_path).folder.iterdir())
    assert len(left) > 4
