"""What a commit flushes and in which order; a disk that has no room."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import pytest
import torch

from quantune.checkpoint import commit
from quantune.checkpoint.commit import verify, write_committed
from quantune.checkpoint.store import CheckpointStore
from quantune.errors import CheckpointError

Usage = namedtuple("Usage", ["total", "used", "free"])


def nested(folder):
    (folder / "shards").mkdir()
    (folder / "shards" / "a.bin").write_bytes(b"a" * 3000)
    (folder / "b.bin").write_bytes(b"b")


def test_every_file_is_flushed_before_the_manifest_and_the_rename_before_the_parent(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(commit, "sync", lambda path: flushed.append(path))
    folder = write_committed(tmp_path, "x", nested)
    names = [path.name if path != tmp_path else "parent" for path in flushed]
    assert names[:3] == ["b.bin", "a.bin", "manifest.json"]
    assert names[3] == "shards" and names[4].startswith("x.tmp-") and names[5] == "parent"
    verify(folder)


def test_a_file_in_a_folder_of_a_checkpoint_is_verified_too(tmp_path):
    folder = write_committed(tmp_path, "x", nested)
    (folder / "shards" / "a.bin").write_bytes(b"z" * 3000)
    with pytest.raises(CheckpointError, match=r"x/shards/a\.bin is damaged"):
        verify(folder)


def test_a_file_the_manifest_does_not_list_is_let_be(tmp_path):
    folder = write_committed(tmp_path, "x", nested)
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = write_committed(tmp_path, "x", nested)
    (folder / "b.bin").rename(tmp_path / "b.bin")
    (folder / "b.bin").symlink_to(tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match=r"names a file outside the folder: b\.bin"):
        verify(folder)


def test_the_manifest_is_not_for_others_to_write(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is the commit's own file"):
        write_committed(tmp_path, "x", lambda folder: (folder / "manifest.json").write_text("{}"))
    assert list(tmp_path.iterdir()) == []


def test_a_committed_folder_is_not_written_into(tmp_path):
    write_committed(tmp_path, "x", nested)
    with pytest.raises(CheckpointError, match="exists already"):
        write_committed(tmp_path, "x", nested)
    verify(tmp_path / "x")


def test_a_rename_that_fails_leaves_the_folder_it_was_to_replace(tmp_path, monkeypatch):
    write_committed(tmp_path, "x", nested)
    rename = os.rename

    def fail(source, target):
        if ".tmp-" in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write_committed(tmp_path, "x", nested, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    verify(tmp_path / "x")


def test_without_room_for_a_checkpoint_like_the_last_one_nothing_is_begun(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, lambda folder: (folder / "a.bin").write_bytes(b"a" * 3 * 2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 2**20))
    with pytest.raises(CheckpointError, match=r"the disk is full: it takes about 3\.0 MiB, 1\.0 MiB are free"):
        store.save(2, lambda folder: pytest.fail("began to write"))
    assert store.steps() == [1]


def test_a_disk_that_fills_while_torch_writes_says_how_much_was_written(tmp_path):
    def fill(folder):
        (folder / "a.bin").write_bytes(b"a" * 2048)
        torch.save({"a": torch.zeros(1000)}, "/dev/full")

    with pytest.raises(CheckpointError, match=r"the disk is full: it takes more than 2\.0 KiB, .* are free"):
        write_committed(tmp_path, "x", fill)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_of_the_disk_passes_through(tmp_path):
    with pytest.raises(RuntimeError, match="must match the size"):
        write_committed(tmp_path, "x", lambda folder: torch.zeros(2) + torch.zeros(3))


def test_a_step_of_nine_digits_is_a_step(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(123_456_789, nested)
    store.save(7, nested)
    assert store.steps() == [7, 123_456_789]
