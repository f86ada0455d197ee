"""`quantune init` as a person uses it."""

from __future__ import annotations

import json

import tomli
from commands import quantune_command, refused


def test_the_first_recipe_checks_and_trains_as_it_stands(tmp_path):
    done = quantune_command("init", "-o", str(tmp_path / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "data"}
    assert quantune_command("check", str(tmp_path / "recipe.toml")).returncode == 0
    run = f"output.dir={tmp_path / 'run'}"
    done = quantune_command("run", str(tmp_path / "recipe.toml"), "--set", run, "--json")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < losses[0] / 2


def test_a_recipe_for_chosen_things_with_its_schema(tmp_path):
    (tmp_path / "mine.csv").write_text("text\nhello\n")
    arguments = ["--backend", "torchao", "--weight-dtype", "fp8", "--task", "completion", "--schema"]
    target = str(tmp_path / "recipe.toml")
    done = quantune_command("init", "-o", target, "--data", str(tmp_path / "mine.csv"), *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "recipe.schema.json", "mine.csv"}
    document = json.loads(quantune_command("check", target, "--json").stdout)
    assert document["quantization"]["weight_dtype"] == "fp8"
    assert document["data"]["train"][0]["path"] == str(tmp_path / "mine.csv")


def test_nothing_is_replaced_without_force(tmp_path):
    (tmp_path / "recipe.toml").write_text("mine")
    said = refused("init", "-o", str(tmp_path / "recipe.toml"))
    assert "recipe.toml already exists; --force replaces what is there" in said
    assert (tmp_path / "recipe.toml").read_text() == "mine" and not (tmp_path / "data").exists()
    assert quantune_command("init", "-o", str(tmp_path / "recipe.toml"), "--force").returncode == 0
    assert "[model]" in (tmp_path / "recipe.toml").read_text()


def test_data_is_kept_even_with_force(tmp_path):
    rows = tmp_path / "data" / "chat.jsonl"
    rows.parent.mkdir()
    rows.write_text("mine")
    (tmp_path / "recipe.toml").write_text("replaced")
    done = quantune_command("init", "-o", str(tmp_path / "recipe.toml"), "--backend", "torchao", "--force")
    assert done.returncode == 0 and f"kept {rows}" in done.stderr and rows.read_text() == "mine"
    assert "torchao" in (tmp_path / "recipe.toml").read_text()
    assert quantune_command("init", "-o", str(tmp_path / "other.toml")).returncode == 0  # without --force, too
    assert rows.read_text() == "mine"


def test_a_second_task_in_the_same_folder_has_a_sample_of_its_own(tmp_path):
    for task in ("chat", "alpaca"):
        recipe = tmp_path / f"{task}.toml"
        assert quantune_command("init", "-o", str(recipe), "--task", task).returncode == 0
        (source,) = tomli.loads(recipe.read_text())["data"]["train"]
        assert (source["path"], source["format"]) == (f"data/{task}.jsonl", task)
    assert set(json.loads((tmp_path / "data" / "alpaca.jsonl").read_text().splitlines()[0])) >= {"instruction"}


def test_what_can_not_be_chosen_is_refused_before_anything_is_written(tmp_path):
    target = str(tmp_path / "recipe.toml")
    assert 'did you mean "bnb"?' in refused("init", "-o", target, "--backend", "bnbb")
    assert 'did you mean "nf4"?' in refused("init", "-o", target, "--weight-dtype", "nf5")
    assert "there is no folder" in refused("init", "-o", target, "--base", "./gone")
    assert "there is no file" in refused("init", "-o", target, "--data", "gone.jsonl")
    assert "--task" in refused("init", "-o", target, "--task", "chess")
    assert "expected a file to write, found the folder ." in refused("init", "-o", "", "--force")
    assert f"found the folder {tmp_path}" in refused("init", "-o", str(tmp_path), "--force")
    assert list(tmp_path.iterdir()) == []
