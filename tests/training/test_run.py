"""Whole runs on the built-in model: what they leave, what they refuse, and that a resumed one is the same run."""

import json
import os
import signal
import time

import pytest
from commands import new_process, quantune_command
from forking import start

RECIPE = """
[model]
base = "builtin:mini"
config = {num_hidden_layers = 2}

[quantization]
backend = "bnb"

[adapter]
r = 4
dropout = 0.1

[[data.train]]
path = "train.jsonl"
format = "chat"

[[data.eval]]
path = "train.jsonl"
format = "chat"
limit = 4

[training]
max_steps = 8
batch_size = 4
learning_rate = 1e-3
precision = "fp32"

[evaluation]
every_steps = 3
exact_match = true
max_new_tokens = 4

[checkpoint]
every_steps = 2

[output]
dir = "{dir}"
"""


def rows(count=24):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {n}?" + " Please." * (n % 5)},
                {"role": "assistant", "content": str(n + 1)},
            ]
        }
        for n in range(count)
    ]


def write_data(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))


@pytest.fixture
def folder(tmp_path):
    """A folder with training data in it."""
    write_data(tmp_path)
    return tmp_path


def recipe_for(folder, name="run", text=RECIPE):
    path = folder / f"{name}.toml"
    path.write_text(text.replace("{dir}", str(folder / name)))
    return path


def quantune(*arguments, check=True, command=quantune_command):
    done = command(*map(str, arguments))
    if check:
        assert done.returncode == 0, done.stderr
    return done


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timings = {"seconds", "tokens_per_second", "tokens_per_second_by_rank", "data_share", "peak_bytes_by_rank"}
    return [{key: value for key, value in json.loads(line).items() if key not in timings} for line in lines]


def test_a_run_leaves_its_recipe_manifest_metrics_checkpoints_and_adapter(folder):
    done = quantune("run", recipe_for(folder), "--json", command=new_process)
    run = folder / "run"
    result = json.loads(done.stdout)
    assert result["steps"] == 8 and len(result["evaluations"]) == 3
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 8}
    steps = [row for row in metrics(run) if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row["tokens"] > row["target_tokens"] > 0 and row["loss"] > 0 for row in steps)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"] and manifest["fingerprints"]["the packed weights"]
    recipe = quantune("check", run / "recipe.toml", "--json")
    resolved = json.loads(recipe.stdout)
    assert resolved["training"]["micro_batch_size"] == 4 and resolved["training"]["warmup_steps"] == 0
    assert resolved["quantization"]["block_size"] == 64
    files = {path.suffix for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert files <= {".json", ".jsonl", ".toml", ".safetensors", ".md", ".jinja"}  # nothing pickled

    again = quantune("run", recipe_for(folder), check=False)
    assert again.returncode == 2 and "holds a finished run" in again.stderr

    answers = quantune("generate", run, "--prompt", "What comes after 3?", "--json", command=new_process)
    assert json.loads(answers.stdout)[0]["prompt"] == "What comes after 3?"
    assert "warning" not in answers.stderr  # the base is packed to the bytes that were trained on


LONGER = RECIPE.replace("max_steps = 8", "max_steps = 14")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_data(folder)
    quantune("run", recipe_for(folder, "whole", LONGER))
    return folder / "whole"


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_with_the_same_bytes(folder, uninterrupted):
    path = recipe_for(folder, "killed", LONGER)
    command = start("run", path, output=folder / "killed.out")
    log = folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and command.wait(0.001) is None:
        if log.exists() and sum('"event": "step"' in line for line in log.read_text().splitlines()) >= 4:
            command.send(signal.SIGKILL)
            break
    assert command.end().code == -signal.SIGKILL, "the fault did not fire"

    refused = quantune("run", path, check=False)
    assert refused.returncode == 2 and "--resume goes on with it" in refused.stderr
    resumed = quantune("run", path, "--resume")
    assert "resuming from step-" in resumed.stderr
    assert adapter_bytes(folder / "killed") == adapter_bytes(uninterrupted)
    assert metrics(folder / "killed") == metrics(uninterrupted)


def test_a_run_asked_to_stop_saves_and_says_how_to_go_on(folder):
    path = recipe_for(folder, text=RECIPE.replace("max_steps = 8", "max_steps = 5000"))
    command = start("run", path, output=folder / "out")
    log = folder / "run" / "metrics.jsonl"
    while command.wait(0.01) is None and not (log.exists() and log.stat().st_size):
        pass
    command.send(signal.SIGTERM)
    done = command.end()
    assert done.code == 75 and "--resume goes on from there" in done.said
    status = json.loads((folder / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert (folder / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_changed_recipe_can_not_be_resumed(folder):
    path = recipe_for(folder)
    quantune("run", path, "--set", "training.max_steps=8", check=True)
    os.remove(folder / "run" / "status.json")  # as if it had died at its end
    refused = quantune("run", path, "--resume", "--set", "adapter.alpha=8", check=False)
    assert refused.returncode == 2 and "adapter.alpha was 32.0, is 8.0" in refused.stderr
    assert "put adapter.alpha back, or start again with --overwrite" in refused.stderr


def test_two_runs_of_one_recipe_end_with_the_same_bytes(folder):
    for name in ("one", "two"):
        quantune("run", recipe_for(folder, name))
    assert adapter_bytes(folder / "one") == adapter_bytes(folder / "two")


def test_accumulating_micro_batches_equals_one_large_batch(folder):
    text = RECIPE.replace("dropout = 0.1", "")
    for name, size in (("whole", 4), ("split", 1)):
        quantune("run", recipe_for(folder, name, text), "--set", f"training.micro_batch_size={size}")
    whole, split = ([row for row in metrics(folder / name) if row["event"] == "step"] for name in ("whole", "split"))
    assert split[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for one, other in zip(whole, split, strict=True):  # Adam magnifies rounding from step to step
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_moments_in_8_bit_train(folder):
    """What else can be set is in `test_matrix`, for every format."""
    path = recipe_for(folder)
    quantune("run", path, "--set", "training.optimizer=adamw_8bit", "--set", "training.max_steps=3")
    losses = [row["loss"] for row in metrics(folder / "run") if row["event"] == "step"]
    assert losses[-1] < losses[0] * 1.5


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_samples(folder):
    done = quantune("run", recipe_for(folder), "--set", "training.learning_rate=1e30", check=False)
    assert done.returncode == 4
    assert "of step 2 is" in done.stderr and "train.jsonl:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('adapter.targets=["q_porj"]', "matches no linear layer (did you mean"),
        ("data.max_length=3", "none of the 24 rows can be used: 24 are longer than max_length = 3"),
        ("model.base=./nowhere", "there is no folder"),
        ("quantization.backend=bnbb", 'found "bnbb"'),
        ("data.train[0].path=gone.jsonl", "there is no file"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(folder, change, message):
    done = quantune("run", recipe_for(folder), "--set", change, check=False)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_typo_does_not_cost_the_run_that_is_to_be_overwritten(folder):
    path = recipe_for(folder)
    quantune("run", path)
    before = adapter_bytes(folder / "run")
    quantune("run", path, "--overwrite", "--set", 'adapter.targets=["q_porj"]', check=False)
    assert adapter_bytes(folder / "run") == before
    (folder / "train.jsonl").unlink()
    assert quantune("generate", folder / "run", "--prompt", "x").stdout  # the data may be gone


def test_the_quickstart_in_a_shortened_form_learns(quickstart, tmp_path):
    run = tmp_path / "quickstart"
    short = ["training.max_steps=20", "evaluation.max_samples=4", f"output.dir={run}"]
    quantune("run", quickstart, *(part for change in short for part in ("--set", change)))
    before, after = (row for row in metrics(run) if row["event"] == "evaluation")
    assert before["exact_match"] == 0.0
    assert after["loss"] < before["loss"] / 3
