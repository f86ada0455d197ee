"""A run folder in odd places: read-only, somebody else's, half-removed; and a damaged metrics log."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from quantune.checkpoint.metrics_log import MetricsLog
from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import RunFolderError

READ_ONLY = """
mount -t tmpfs none {place} && mkdir {place}/run && mount -o remount,ro {place} && {python} -c '
from pathlib import Path
from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import RunFolderError
for name in ("run", "new"):
    try:
        with RunFolder.open(Path("{place}") / name, "new"):
            pass
    except RunFolderError as error:
        print(error)
'
"""


def test_a_read_only_place_is_refused(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    script = READ_ONLY.format(place=tmp_path, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("can't be written to: Read-only file system. Choose another output.dir") == 2


@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_folders_that_only_have_the_names_of_ours_are_never_deleted(tmp_path, mode):
    for name in ("adapter", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".lock").write_text("of another program")
    with pytest.raises(RunFolderError, match="is not a run folder"), RunFolder.open(tmp_path, mode):
        pass
    assert (tmp_path / "adapter" / "mine").exists() and (tmp_path / "checkpoints" / "mine").exists()


def test_resuming_in_an_empty_folder_leaves_it_empty(tmp_path):
    with pytest.raises(RunFolderError, match="is empty. Leave out --resume"), RunFolder.open(tmp_path, "resume"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_dead_run_are_removed(tmp_path):
    with RunFolder.open(tmp_path, "new") as run:
        run.checkpoints.save(1, lambda path: (path / "x").write_text("x"))
        run.write_status("running", 1)
    (tmp_path / "status.json.tmp-0123abcd").write_text("{")
    (tmp_path / "adapter.tmp-0123abcd").mkdir()
    with RunFolder.open(tmp_path, "resume"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "status.json"]


def test_the_lock_is_free_after_the_run_even_if_a_forked_worker_lives_on(tmp_path):
    with RunFolder.open(tmp_path, "new"):
        ready, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(ready, 1)
            os._exit(0)
    with RunFolder.open(tmp_path, "new"):
        pass
    os.close(end)
    os.waitpid(child, 0)


def test_an_error_in_the_run_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), RunFolder.open(tmp_path, "new"):
        raise KeyError
    with RunFolder.open(tmp_path, "new"):
        pass


def test_status_has_the_step(tmp_path):
    with RunFolder.open(tmp_path, "new") as run:
        run.write_status("interrupted", 12)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "interrupted", "step": 12}


@pytest.mark.parametrize("line", ["garbage", "[1]", "{}", '{"step": "x"}', "3"])
def test_a_damaged_line_within_the_metrics_is_named(tmp_path, line):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: expected a JSON object with a step"):
        log.rows()


def test_a_row_is_on_its_way_to_the_disk_when_append_returns(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "note": "a\u2028b"})
    child = os.fork()
    if child == 0:
        os._exit(0 if log.rows() == [{"step": 1, "note": "a\u2028b"}] else 1)
    assert os.waitpid(child, 0)[1] == 0
