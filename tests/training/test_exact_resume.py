"""A run that was interrupted, killed, damaged or changed goes on as the run it was, or says why not."""

import json
import os
import shutil
import signal

import attrs
import pytest
from support import Silent
from typer.testing import CliRunner

from quantune.checkpoint.audit import audit
from quantune.checkpoint.run_folder import RunFolder
from quantune.cli import app
from quantune.errors import CheckpointError, InputError, InterruptedRun, ResumeError
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.run import train


class Died(Exception):
    """Something unforeseen."""


class Watched(Silent):
    """Asks a run to stop in a step (0: before the first one) or lets it die there; remembers what it was told.

    A request that comes at the end of a step is agreed on in the next one, or in an evaluation before it.
    """

    def __init__(self, *, stop_in=None, die_in=None):
        self.stop_in, self.die_in = stop_in, die_in
        self.warnings, self.checkpoints = [], []

    def start(self, step, total):
        self._at(0)

    def step(self, metrics):
        self._at(metrics.step)

    def _at(self, step):
        if step == self.die_in:
            raise Died
        if step == self.stop_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def warning(self, text):
        self.warnings.append(text)

    def checkpoint(self, step):
        self.checkpoints.append(step)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Six steps of three of eight samples, more than two epochs, with dropout; evaluated before the first and after
    every third step, saved after every second one."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"The number after {n} is {n + 1}."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(path), format="completion")
    return Recipe(
        model=ModelConfig(base="builtin:mini", config={"num_hidden_layers": 1}),
        adapter=AdapterConfig(r=4, dropout=0.1),
        data=DataConfig(train=(source,), eval=(source,)),
        training=TrainingConfig(max_steps=6, batch_size=3, micro_batch_size=1, precision="fp32", device="cpu"),
        evaluation=EvaluationConfig(every_steps=3, at_start=True, max_samples=1),
        checkpoint=CheckpointConfig(every_steps=2),
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of a run of it that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe, folder)
    return folder


def changed(recipe, **tables):
    return attrs.evolve(recipe, **{name: attrs.evolve(getattr(recipe, name), **keys) for name, keys in tables.items()})


def run(made, folder, mode="new", *, allow=(), **observed):
    """A run that gets to its end, or to where `observed` says; its observer."""
    observer = Watched(**observed)
    try:
        with RunFolder.open(folder, mode) as opened:
            train(made, opened, observer, resume=mode == "resume", allow_changes=allow)
    except InterruptedRun:
        assert observer.stop_in is not None
    except Died:
        assert observer.die_in is not None
    else:
        assert observed == {}, "the fault did not fire"
    return observer


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def told(folder):
    """The metrics of a run without what a clock measured."""
    measured = {"seconds", "tokens_per_second", "tokens_per_second_by_rank", "data_share", "peak_bytes_by_rank"}
    return [{k: v for k, v in row.items() if k not in measured} for row in RunFolder(folder).metrics.rows()]


def judged(folder):
    verdict = audit(RunFolder(folder).history.rows())
    assert verdict.sound, verdict.problems
    return verdict


@pytest.mark.parametrize(
    ("asked_in", "stopped_after"),
    [(0, 1), (1, 2), (2, 3), (3, 3), (4, 5)],
    ids=["at once", "at a save", "before an evaluation", "in an evaluation", "between all"],
)
def test_a_run_stopped_in_any_step_ends_with_the_same_bytes(recipe, whole, tmp_path, asked_in, stopped_after):
    run(recipe, tmp_path, stop_in=asked_in)
    assert run(recipe, tmp_path, "resume").warnings == []
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert told(tmp_path) == told(whole)
    verdict = judged(tmp_path)
    assert verdict.done_again == 0 and verdict.attempts[0].last == stopped_after


@pytest.mark.parametrize(
    ("died_in", "done_again"),
    [(1, 1), (2, 2), (3, 1), (6, 2)],
    ids=["first", "before the first save", "in an evaluation's", "last"],
)
def test_a_run_that_died_in_any_step_ends_with_the_same_bytes(recipe, whole, tmp_path, died_in, done_again):
    run(recipe, tmp_path, die_in=died_in)
    warnings = run(recipe, tmp_path, "resume").warnings
    assert warnings == ["the run stopped before its first checkpoint was committed; it begins again"] * (died_in <= 2)
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert told(tmp_path) == told(whole)
    assert judged(tmp_path).done_again == done_again


def test_a_run_that_dies_again_and_again_ends_with_the_same_bytes(recipe, whole, tmp_path):
    run(recipe, tmp_path, stop_in=1)
    for step in (3, 5, 6):
        run(recipe, tmp_path, "resume", die_in=step)
    run(recipe, tmp_path, "resume")
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert [attempt.resumed for attempt in judged(tmp_path).attempts] == [None, 2, 2, 4, 4]


def test_another_seed_ends_with_other_bytes(recipe, whole, tmp_path):
    run(changed(recipe, training={"seed": 43}), tmp_path)
    assert adapter_bytes(tmp_path) != adapter_bytes(whole)


def test_an_adapter_to_start_from_is_started_from_again_where_nothing_was_saved(recipe, whole, tmp_path):
    made = changed(recipe, adapter={"start_from": str(whole / "adapter")})
    run(made, tmp_path / "whole")
    run(made, tmp_path / "run", die_in=2)
    run(made, tmp_path / "run", "resume")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole") != adapter_bytes(whole)


def test_evaluations_checkpoints_and_reports_change_nothing_of_what_is_trained(recipe, whole, tmp_path):
    other = changed(
        recipe,
        evaluation={"every_steps": None, "at_start": False, "exact_match": True, "max_new_tokens": 2, "batch_size": 1},
        checkpoint={"every_steps": None, "keep": 5},
        logging={"every_steps": 1},
    )
    run(recipe, tmp_path / "run", stop_in=4)
    assert run(other, tmp_path / "run", "resume").warnings == []
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)


def test_a_changed_recipe_goes_on_when_it_is_allowed_to_and_does_what_it_says(recipe, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder, stop_in=3)
    made = changed(recipe, training={"max_steps": 8, "learning_rate": 1e-5, "beta1": 0.5, "schedule": "constant"})
    with pytest.raises(ResumeError, match="--allow-change training.schedule --allow-change training.beta1"):
        run(made, folder, "resume")
    allow = ["training.max_steps", "training.learning_rate", "training.beta1", "training.schedule"]
    warnings = run(made, folder, "resume", allow=allow, die_in=7).warnings
    assert len(warnings) == 4 and "training.max_steps was 6, is 8" in warnings[0]
    assert RunFolder(folder).metrics.rows()[-1]["learning_rate"] == 1e-5
    assert run(made, folder, "resume", allow=allow).warnings == []  # a launcher repeats its command
    assert judged(folder).steps == 8
    saved = json.loads((folder / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert saved["optimizer"]["groups"][0]["betas"] == [0.5, 0.999]


def test_allowing_what_did_not_change_is_refused(recipe, tmp_path):
    run(recipe, tmp_path / "run", stop_in=1)
    with pytest.raises(InputError, match="--allow-change training.eps: expected a key that changed"):
        run(recipe, tmp_path / "run", "resume", allow=["training.eps"])


def test_a_data_file_that_changed_between_runs_is_named(recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    shutil.copy(recipe.data.train[0].path, path)
    recipe = changed(recipe, data={"train": (SourceConfig(path=str(path), format="completion"),)})
    run(recipe, tmp_path / "run", stop_in=1)
    path.write_text(path.read_text().replace("number after 3", "number behind 3"))
    named = r"the tokens of the training data changed .*\(rows.jsonl of data.train\[0\] was sha256"
    with pytest.raises(ResumeError, match=named):
        run(recipe, tmp_path / "run", "resume")


def test_data_that_moved_is_the_same_data(recipe, tmp_path):
    run(recipe, tmp_path / "run", stop_in=1)
    moved = shutil.copy(recipe.data.train[0].path, tmp_path / "moved.jsonl")
    source = SourceConfig(path=str(moved), format="completion")
    observer = run(changed(recipe, data={"train": (source,), "eval": (source,)}), tmp_path / "run", "resume")
    assert observer.warnings == [] and observer.checkpoints == [4, 6]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "is damaged: its sha256 is not the one it was written with": flip,
    "bytes, expected": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    recipe, whole, tmp_path, message, damage
):
    run(recipe, tmp_path / "run", die_in=5)
    damage(tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    (sentence,) = run(recipe, tmp_path / "run", "resume").warnings
    assert sentence.startswith("step-00000004/optimizer.safetensors ") and message in sentence
    assert sentence.endswith("falling back to step-00000002, what was done after it is done again")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    attempt = judged(tmp_path / "run").attempts[1]
    assert attempt.resumed == 2 and attempt.passed_over == (sentence,)


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_kept(recipe, tmp_path):
    run(recipe, tmp_path / "run", stop_in=1)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*run is whole; --overwrite"):
        run(recipe, tmp_path / "run", "resume")
    assert checkpoint.is_dir()


def test_a_commit_that_no_one_lived_to_tell_of_is_gone_on_from(recipe, tmp_path):
    run(recipe, tmp_path / "run", stop_in=0)
    path = tmp_path / "run" / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["event"] not in ("checkpoint", "interrupted")]
    assert len(kept) == len(lines) - 2
    path.write_text("".join(kept))
    run(recipe, tmp_path / "run", "resume")
    assert judged(tmp_path / "run").attempts[1].resumed == 1


def test_what_overwrites_a_run_begins_a_history_of_its_own(recipe, tmp_path):
    run(recipe, tmp_path, stop_in=0)
    run(recipe, tmp_path, "overwrite")
    assert len(judged(tmp_path).attempts) == 1


def test_the_command_shows_the_attempts_and_fails_on_a_doctored_history(recipe, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder, stop_in=4)
    run(recipe, folder, "resume")
    shown = CliRunner().invoke(app, ["history", str(folder)])
    assert shown.exit_code == 0 and "6 of 6 steps, each once, in order, with its samples" in shown.stdout
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if (row := json.loads(line))["event"] != "step" or row["step"] != 3]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))
    doctored = CliRunner().invoke(app, ["history", str(folder), "--json"])
    assert doctored.exit_code == 1
    verdict = json.loads(doctored.stdout)
    assert not verdict["sound"] and "expected step 3 in attempt 1, found step 4" in verdict["problems"]
    assert CliRunner().invoke(app, ["history", str(tmp_path)]).exit_code != 0
