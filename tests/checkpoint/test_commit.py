"""A checkpoint is whole or absent, whatever happens while it is written; damage is found and named."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

from quantune.checkpoint.commit import verify, write_committed, write_file
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import CheckpointError

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def content(tag):
    def write(folder: Path) -> None:
        for name in ("a.bin", "b.bin"):
            (folder / name).write_bytes(tag.encode() * 1000)

    return write


def save_well(store, step, tag):
    store.save(step, content(tag))


def save_naively(store, step, tag):
    """What the protocol is there to avoid: writing the folder in its place."""
    folder = store.path(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"files": {}}')
    content(tag)(folder)


def kill_at(event_number, action):
    """Run `action` in a forked child that SIGKILLs itself at its n-th file event; False when it got through."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, _):
            nonlocal seen
            if event in EVENTS:
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def broken_after_a_crash(folder, save):
    """Event numbers after whose SIGKILL the store offers something that is neither the old nor the new checkpoint."""
    broken, number = [], 0
    while True:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        store = CheckpointStore(folder)
        store.save(1, content("old"))
        if not kill_at(number, lambda store=store: save(store, 2, "new")):
            break
        latest = store.latest_verified(lambda _: None)
        expected = {"step-00000001": b"old" * 1000, "step-00000002": b"new" * 1000}
        files = [] if latest is None else [latest / "a.bin", latest / "b.bin"]
        if not files or any(not f.exists() or f.read_bytes() != expected[latest.name] for f in files):
            broken.append(number)
    assert number > 4, "the fault did not fire"
    return broken


def test_killed_at_any_event_of_a_save_the_old_or_the_new_checkpoint_is_whole(tmp_path):
    assert broken_after_a_crash(tmp_path / "store", save_well) == []


def test_the_same_harness_catches_a_naive_writer(tmp_path):
    assert broken_after_a_crash(tmp_path / "store", save_naively)


def test_leftovers_of_a_dead_save_are_ignored_and_pruned(tmp_path):
    store = CheckpointStore(tmp_path / "store")
    save_well(store, 1, "x")
    kill_at(3, lambda: save_well(store, 2, "y"))
    assert any(".tmp-" in path.name for path in store.folder.iterdir())
    assert store.steps() == [1]
    store.prune(2)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a.bin is damaged": lambda folder: flip(folder / "a.bin"),
    "a.bin has 10 bytes, expected 1000": lambda folder: (folder / "a.bin").write_bytes(b"x" * 10),
    "a.bin is missing": lambda folder: (folder / "a.bin").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged": lambda folder: (folder / "manifest.json").write_text("{"),
    "names a file outside the folder": lambda folder: (folder / "manifest.json").write_text(
        '{"files": {"../x": {"size": 0, "sha256": ""}}}'
    ),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items())
def test_damage_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, message, damage):
    store = CheckpointStore(tmp_path)
    for step in (5, 10):
        store.save(step, content("x"))
    damage(store.path(10))
    with pytest.raises(CheckpointError, match=message):
        verify(store.path(10))
    heard = []
    assert store.latest_verified(heard.append) == store.path(5)
    assert message in heard[0] and "falling back" in heard[0]


def test_the_latest_is_the_highest_step_whatever_the_clock_says(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 9):
        store.save(step, content("x"))
    os.utime(store.path(9), (2e9, 2e9))
    assert store.latest_verified(pytest.fail) == store.path(10)


def test_pruning_leaves_two_whole_checkpoints_besides_damaged_ones(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        store.save(step, content("x"))
    flip(store.path(4) / "a.bin")
    store.prune(2)
    assert store.steps() == [2, 3, 4]


def test_a_failed_save_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_committed(tmp_path, "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_to_be_one_and_leaves_what_was_there(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, content("x"))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.save(2, content("y"))
        except CheckpointError as error:
            os._exit(0 if "the disk is full" in str(error) else 1)
        os._exit(2)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify(store.path(1))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_file(path, "one")
    write_file(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]
