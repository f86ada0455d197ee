"""Who may use a run's folder."""

import json
import os
import signal

import pytest

from quantune.checkpoint.run_folder import RunFolder
from quantune.errors import EXIT_IN_USE, RunFolderError


def fill(folder, state, checkpoint=True):
    with RunFolder.open(folder, "new") as run:
        run.write_recipe("x = 1")
        if checkpoint:
            run.checkpoints.save(3, lambda path: (path / "x").write_text("x"))
        run.write_status(state, 3)


def refusal(folder, mode, exit_code=2):
    with pytest.raises(RunFolderError) as caught, RunFolder.open(folder, mode):
        pass
    assert caught.value.exit_code == exit_code
    return str(caught.value)


def test_a_finished_run_is_not_run_again_by_accident(tmp_path):
    fill(tmp_path / "run", "finished")
    assert "--overwrite starts it again" in refusal(tmp_path / "run", "new")
    assert "is finished" in refusal(tmp_path / "run", "resume")


def test_an_unfinished_run_is_resumed_or_overwritten_on_purpose(tmp_path):
    fill(tmp_path / "run", "interrupted")
    assert "--resume goes on with it, --overwrite starts it again" in refusal(tmp_path / "run", "new")
    with RunFolder.open(tmp_path / "run", "resume") as run:
        assert run.checkpoints.steps() == [3]


def test_a_run_that_died_before_its_first_checkpoint_is_simply_run_again(tmp_path):
    fill(tmp_path / "run", "running", checkpoint=False)
    with RunFolder.open(tmp_path / "run", "resume") as run:
        assert run.checkpoints.steps() == []
    with RunFolder.open(tmp_path / "run", "new") as run:
        run.clear()
        assert run.state() is None


def test_there_is_nothing_to_resume_where_nothing_is(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone", "resume")
    assert not (tmp_path / "gone").exists()


def test_overwriting_removes_quantune_s_files_only(tmp_path):
    fill(tmp_path / "run", "finished")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with RunFolder.open(tmp_path / "run", "overwrite") as run:
        run.clear()
        assert run.state() is None and run.checkpoints.steps() == []
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_a_folder_of_something_else_is_never_touched(tmp_path, mode):
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not a run folder, and not empty (thesis.tex)" in refusal(tmp_path, mode)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["recipe.toml", "manifest.json", "metrics.jsonl"])
def test_a_file_that_only_has_a_run_s_name_is_never_deleted(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for mode in ("new", "overwrite", "resume"):
        assert f"is not a run folder, and not empty ({name})" in refusal(tmp_path, mode)
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_folder_copied_without_its_lock_is_still_one(tmp_path):
    fill(tmp_path / "run", "interrupted")
    (tmp_path / "run" / ".lock").unlink()
    with RunFolder.open(tmp_path / "run", "resume") as run:
        assert run.checkpoints.steps() == [3]


def test_of_linked_checkpoints_overwriting_removes_the_link(tmp_path):
    fill(tmp_path / "run", "interrupted")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with RunFolder.open(tmp_path / "run", "overwrite") as run:
        run.clear()
        assert run.checkpoints.steps() == []
    assert (tmp_path / "elsewhere" / "step-00000003").exists()


@pytest.mark.parametrize("status", ["", "{", "[]", "{}"])
def test_a_status_that_can_not_be_read_is_none(tmp_path, status):
    with RunFolder.open(tmp_path / "run", "new") as run:
        (tmp_path / "run" / "status.json").write_text(status)
        assert run.state() is None


def test_what_is_written_about_a_run_can_be_read(tmp_path):
    with RunFolder.open(tmp_path / "run", "new") as run:
        run.write_manifest({"device": "cpu"})
        run.write_status("running", 7)
        assert json.loads((run.path / "manifest.json").read_text()) == {"device": "cpu"}
        assert run.state() == "running"
        assert run.adapter == tmp_path / "run" / "adapter"


def test_a_file_and_an_unwritable_place_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "found a file" in refusal(tmp_path / "file", "new")
    assert "can't be written to" in refusal(tmp_path / "file" / "run", "new")


def test_a_folder_in_use_names_who_uses_it(tmp_path):
    ready, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder.open(tmp_path / "run", "new"):
            os.write(write_end, b"x")
            signal.pause()
    os.read(ready, 1)
    try:
        assert f"is in use by process {child} on " in refusal(tmp_path / "run", "overwrite", EXIT_IN_USE)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunFolder.open(tmp_path / "run", "new"):
        pass  # the lock died with its holder


def test_metrics_of_later_steps_and_a_torn_line_are_dropped_on_resume(tmp_path):
    with RunFolder.open(tmp_path / "run", "new") as run:
        for step in (1, 2, 3):
            run.metrics.append({"step": step})
        with run.metrics.path.open("a") as file:
            file.write('{"step": 4')
        run.metrics.truncate_after(2)
        assert run.metrics.rows() == [{"step": 1}, {"step": 2}]


def test_a_run_without_metrics_has_no_rows(tmp_path):
    with RunFolder.open(tmp_path / "run", "new") as run:
        assert run.metrics.rows() == []
        run.metrics.truncate_after(3)
        assert run.metrics.rows() == []


def test_a_damaged_line_among_the_metrics_is_named(tmp_path):
    with RunFolder.open(tmp_path / "run", "new") as run:
        run.metrics.path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
        with pytest.raises(
            RunFolderError, match=r"metrics.jsonl:2: expected a JSON object with a step, found 'broken'"
        ):
            run.metrics.truncate_after(2)


def test_resuming_removes_the_temporary_files_of_a_dead_process_and_no_others(tmp_path):
    fill(tmp_path / "run", "interrupted")
    for name in ("status.json.tmp-12345678", "mine.tmp-12345678"):
        (tmp_path / "run" / name).write_text("x")
    with RunFolder.open(tmp_path / "run", "resume"):
        pass
    assert {path.name for path in (tmp_path / "run").glob("*.tmp-*")} == {"mine.tmp-12345678"}


def test_another_program_s_lock_makes_no_run_folder(tmp_path):
    (tmp_path / ".lock").write_text("held by a browser")
    (tmp_path / "adapter").mkdir()
    assert "is not a run folder, and not empty" in refusal(tmp_path, "overwrite")
    assert (tmp_path / "adapter").is_dir()


def test_a_run_that_died_goes_on_from_its_own_checkpoints(tmp_path):
    path = tmp_path / "run"
    assert RunFolder(path).going_on("new") == "overwrite"  # it had not begun
    fill(path, "running")
    assert RunFolder(path).going_on("new") == "resume"
    fill_status(path, "finished")
    assert RunFolder(path).going_on("new") is None


def test_a_run_that_dies_before_it_overwrites_another_does_not_go_on_with_that_one(tmp_path):
    path = tmp_path / "run"
    fill(path, "finished")
    with RunFolder.open(path, "overwrite"):
        pass  # it dies while it loads
    assert RunFolder(path).going_on("overwrite") == "overwrite"
    with RunFolder.open(path, "overwrite") as run:
        run.clear()
        run.checkpoints.save(1, lambda path: (path / "x").write_text("x"))
        run.write_status("running", 1)
    assert RunFolder(path).going_on("overwrite") == "resume"


def test_a_run_that_was_not_overwritten_after_all_can_be_resumed(tmp_path):
    path = tmp_path / "run"
    fill(path, "running")
    for mode in ("overwrite", "resume"):
        with RunFolder.open(path, mode):
            pass
    assert RunFolder(path).going_on("overwrite") == "resume"


def fill_status(path, state):
    with RunFolder.open(path, "resume") as run:
        run.write_status(state, 3)
