"""`quantune run` with several processes, as a person or a launcher starts it."""

import json
import signal
import time

import pytest
from commands import quantune_command, refused
from forking import start

from quantune.cli.console import meaning

RECIPE = """
[model]
base = "builtin:mini"
[adapter]
r = 4
[[data.train]]
path = "rows.jsonl"
format = "instruct"
[training]
max_steps = {steps}
batch_size = 4
micro_batch_size = 1
learning_rate = 1e-3
precision = "fp32"
device = "cpu"
[checkpoint]
every_steps = 2
[logging]
every_steps = 1
[output]
dir = "{folder}/run"
"""


def recipe(folder, steps=4):
    rows = ({"prompt": f"Count {n}", "response": f"{n}, then {n + 1}."} for n in range(12))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(steps=steps, folder=folder))
    return str(path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--processes", "0"], "[distributed.processes]"),
        (["--processes", "two"], "[distributed.processes]"),
        (["--processes", "2", "--nodes", "2"], "--nodes needs --rendezvous HOST:PORT"),
        (["--resume", "--overwrite"], "are three different things"),
    ],
)
def test_what_makes_no_world_is_refused_before_anything_is_started(tmp_path, options, sentence):
    assert sentence in refused("run", recipe(tmp_path), *options)
    assert not (tmp_path / "run").exists()


def test_a_launched_process_is_not_told_of_machines(tmp_path):
    machines = ["--nodes", "2", "--rendezvous", "host:29500"]
    said = refused("run", recipe(tmp_path), *machines, RANK="0", WORLD_SIZE="1")
    assert "a launcher has started this process already" in said


def test_a_problem_in_a_recipe_is_told_once(tmp_path):
    path = recipe(tmp_path)
    said = refused("run", path, "--processes", "2", "--set", "adapter.r=0")
    assert said.count("[adapter.r]") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rank_0_speaks_and_the_others_have_logs_and_a_finished_run_is_left_alone(tmp_path):
    path = recipe(tmp_path)
    done = quantune_command("run", path, "--processes", "2", "--json", "--resume-or-start")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert done.stderr.count("step 1/4") == 1 and "shared by 2 processes" in done.stderr
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert log.startswith("--- attempt 0, process ") and "step 4/4" in log
    again = quantune_command("run", path, "--processes", "2", "--resume-or-start")
    assert again.returncode == 0 and again.stdout.startswith(f"the run in {tmp_path / 'run'} is finished already;")


def test_an_error_of_the_system_names_the_file(capsys):
    code, speak = meaning(False, IsADirectoryError(21, "Is a directory", "run/logs/rank-1.log"))
    speak("rank 1: ")
    assert code == 1 and capsys.readouterr().err == "error: rank 1: run/logs/rank-1.log: Is a directory\n"


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_goes_on_with_the_same_command(tmp_path):
    command = start("run", recipe(tmp_path, steps=400), "--processes", "2", output=tmp_path / "out")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and command.wait(0.01) is None and not (metrics.exists() and metrics.read_text()):
        pass
    command.send(signal.SIGTERM)
    done = command.end()
    assert done.code == 75 and done.said.count("interrupted:") == 1, done.said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted" and 1 <= status["step"] < 400
    stopped = status["step"]
    done = quantune_command(
        "run", recipe(tmp_path, steps=stopped + 2), "--resume-or-start", "--allow-change", "training.max_steps"
    )  # alone, this time
    assert done.returncode == 0, done.stderr
    assert f"resuming from step-{stopped:08d}" in done.stderr and f"step {stopped + 1}/{stopped + 2}" in done.stderr
