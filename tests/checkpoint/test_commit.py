"""Damage to a checkpoint is found and named; a failed save leaves what was there. For crashes see tests/faults."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantune.checkpoint.commit import verify, write_committed, write_file_atomically
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import CheckpointError

NAMES = ("a.bin", "b.bin", "c.bin")


def content(tag):
    def write(folder: Path) -> None:
        for name in NAMES:
            (folder / name).write_bytes(tag.encode() * 1000)

    return write


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a.bin is damaged": lambda folder: flip(folder / "a.bin"),
    "a.bin has 10 bytes, expected 1000": lambda folder: (folder / "a.bin").write_bytes(b"x" * 10),
    "a.bin is missing": lambda folder: (folder / "a.bin").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json can't be read": lambda folder: (
        (folder / "manifest.json").unlink(),
        (folder / "manifest.json").mkdir(),
    ),
    "can't be read": lambda folder: (folder / "manifest.json").write_text(
        r'{"files": {"a\u0000": {"size": 0, "sha256": ""}}}'
    ),
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


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": []}', '{"files": {"a.bin": 3}}', '{"files": {"a": {}}}']
)
def test_a_manifest_that_is_none_is_said_to_be_damaged(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        verify(tmp_path)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_harmless(tmp_path):
    folder = write_committed(tmp_path, "x", lambda path: (path / "a.bin").write_bytes(b"xyz"))
    found = 0
    for path in (folder / "a.bin", folder / "manifest.json"):
        whole = path.read_bytes()
        for index in range(len(whole)):
            damaged = bytearray(whole)
            damaged[index] ^= 4
            path.write_bytes(damaged)
            try:
                verify(folder)
            except CheckpointError:
                found += 1
            else:
                assert whole[index : index + 1].isspace()
        path.write_bytes(whole)
    assert found > 100
    verify(folder)


def test_no_whole_checkpoint_at_all_is_none_with_a_report_of_each(tmp_path):
    store = CheckpointStore(tmp_path)
    heard = []
    assert store.latest_verified(heard.append) is None and heard == []
    for step in (1, 2):
        store.save(step, content("x"))
        flip(store.path(step) / "b.bin")
    assert store.latest_verified(heard.append) is None
    assert [line.split("/")[0] for line in heard] == ["step-00000002", "step-00000001"]


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_of_its_step(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, content("x"))
    flip(store.path(5) / "a.bin")
    store.save(5, content("y"))
    assert store.latest_verified(pytest.fail) == store.path(5)
    assert (store.path(5) / "a.bin").read_bytes() == b"y" * 1000


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


def with_safetensors(folder):
    save_file({"weight": torch.zeros(1000)}, folder / "a.safetensors")


@pytest.mark.parametrize("write", [content("y"), with_safetensors])
def test_a_full_disk_is_said_to_be_one_and_leaves_what_was_there(tmp_path, write):
    store = CheckpointStore(tmp_path)
    store.save(1, content("x"))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.save(2, write)
        except CheckpointError as error:
            os._exit(0 if "the disk is full" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify(store.path(1))


def test_with_too_little_space_a_save_is_not_even_begun(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, content("x"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 7_001, 2_999))
    with pytest.raises(
        CheckpointError, match=r"step-00000002 could not be written, the disk is full.*2.9 KiB are free"
    ):
        store.save(2, lambda _: pytest.fail("it was begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 7_000, 3_000))
    store.save(2, content("x"))
    assert store.steps() == [1, 2]


def test_what_is_there_is_not_written_over_by_accident(tmp_path):
    write_committed(tmp_path, "x", content("old"))
    with pytest.raises(CheckpointError, match="exists already"):
        write_committed(tmp_path, "x", content("new"))
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes()[:3] == b"old"


def test_folders_in_a_folder_are_verified_too(tmp_path):
    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "a.bin").write_bytes(b"xyz")

    verify(folder := write_committed(tmp_path, "x", write))
    flip(folder / "inner" / "a.bin")
    with pytest.raises(CheckpointError, match="x/inner/a.bin is damaged"):
        verify(folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = write_committed(tmp_path, "x", content("x"))
    (folder / "a.bin").rename(tmp_path / "a.bin")
    (folder / "a.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="names a file outside the folder: a.bin"):
        verify(folder)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_file_atomically(path, "one")
    write_file_atomically(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_not_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_file_atomically(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_file_atomically(path, "two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
