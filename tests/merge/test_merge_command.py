"""`quantune merge` as a person uses it, on the run of a real recipe; and what it refuses."""

import json
import shutil
import time

import forking
import pytest
import torch
from commands import quantune_command, refused
from merge.conftest import with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

RECIPE = """
[model]
base = {base}
[quantization]
backend = "bnb"
[adapter]
r = 4
[[data.train]]
path = "train.jsonl"
format = "instruct"
template = "{{prompt}} = "
[training]
max_steps = 20
batch_size = 2
learning_rate = 1e-2
precision = "fp32"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the finished run of a recipe: `runs/recipe`, on the base in `base`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "train.jsonl").write_text(
        '{"prompt": "1 + 1", "response": "two"}\n{"prompt": "5 + 2", "response": "x"}\n'
    )
    from quantune.model import mini

    shutil.copytree(mini.PATH, folder / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "recipe.toml").write_text(RECIPE.format(base='"base"'))
    done = quantune_command("run", "recipe.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def other_base(place, tmp_path):
    """A base of the same architecture with other weights."""
    shutil.copytree(place / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].mul_(1.5)
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "other")


def test_run_is_merged_verified_and_loads_in_plain_transformers(place, tmp_path):
    done = quantune_command("merge", "runs/recipe", "--out", str(tmp_path / "merged"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "28 weights merged, 10 tensors as they were; bfloat16, onto the dequantized base" in done.stdout
    assert "verified: KL" in done.stdout and "the run's training data" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["verification"]["found"]["kl"] < report["verification"]["adapter"]["kl"] / 100


def test_adapter_that_was_carried_off_says_what_it_belongs_to(place, tmp_path):
    shutil.copytree(place / "runs" / "recipe" / "adapter", tmp_path / "carried")
    options = ("--no-verify", "--json")
    done = quantune_command("merge", str(tmp_path / "carried"), "--out", str(tmp_path / "a"), *options)
    assert json.loads(done.stdout)["merged"] == 28
    there = quantune_command("merge", "runs/recipe", "--out", str(tmp_path / "b"), *options, cwd=place)
    assert there.returncode == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("files", [1, 6])
def test_killed_merge_goes_on_where_it_was(files, place, tmp_path):
    """SIGKILL, at whatever moment that is, once some files are complete."""
    arguments = ("merge", place / "runs" / "recipe", "--max-shard-size", "300KB", "--no-verify", "--out")
    whole, out = tmp_path / "whole", tmp_path / "merged"
    assert forking.start(*arguments, whole, output=tmp_path / "said").end().code == 0
    command = forking.start(*arguments, out, output=tmp_path / "said")
    progress = tmp_path / "merged.partial" / "progress.json"
    deadline = time.monotonic() + 60
    while not (progress.exists() and len(json.loads(progress.read_text())["complete"]) >= files):
        assert command.wait(0.001) is None and time.monotonic() < deadline, command.said()
    command.kill()
    assert not out.exists() and not (tmp_path / "merged.partial" / "config.json").exists()
    done = forking.start(*arguments, out, output=tmp_path / "said").end()
    assert done.code == 0 and "merged.partial: " in done.said and "of its files are complete" in done.said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_ways_are_compared_and_nothing_is_written(place):
    before = sorted(path.name for path in (place / "runs" / "recipe").iterdir())
    done = quantune_command("merge", "runs/recipe", "--compare", "--json", cwd=place)
    ways = {row["way"]: row for row in json.loads(done.stdout)["rows"]}
    assert ways["dequantized"]["kept"] == pytest.approx(1, abs=0.01)
    assert ways["dequantized"]["kl"] < ways["original"]["kl"] < ways["packed"]["kl"] * 10
    assert sorted(path.name for path in (place / "runs" / "recipe").iterdir()) == before


def test_another_base_is_refused_unless_forced(place, other_base, tmp_path):
    said = refused("merge", "runs/recipe", "--base", other_base, "--out", str(tmp_path / "m"), cwd=place)
    assert "was trained on another base: model.safetensors of this one is not what it was trained on" in said
    assert "--force merges all the same" in said
    arguments = ("--base", other_base, "--force", "--no-verify", "--out", str(tmp_path / "m"))
    done = quantune_command("merge", "runs/recipe", *arguments, cwd=place)
    assert done.returncode == 0 and "packs to other bytes" in done.stderr


def test_base_of_other_shapes_is_refused_even_when_forced(place, bases, tmp_path):
    arguments = ("--base", str(bases["llama"]), "--force", "--out", str(tmp_path / "m"))
    said = refused("merge", "runs/recipe", *arguments, cwd=place)
    assert "was trained on another base: size mismatch for" in said
    assert not list(tmp_path.iterdir())


def test_base_that_moved_is_found_where_it_is_said_to_be(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "moved")
    arguments = ("--base", "moved", "--out", "merged", "--no-verify")
    done = quantune_command("merge", str(place / "runs" / "recipe"), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_no_adapter_is_refused(place, tmp_path):
    assert "found nothing" in refused("merge", "nowhere", cwd=place)
    assert "expected an adapter in" in refused("merge", "base", "--out", "m", cwd=place)
    shutil.copytree(place / "runs" / "recipe" / "adapter", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    said = refused("merge", str(tmp_path / "pickled"), "--out", str(tmp_path / "m"))
    assert "does not read pickled adapters" in said
    shutil.copytree(place / "runs" / "recipe", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "status.json").write_text('{"state": "interrupted", "step": 3}')
    assert "is not finished" in refused("merge", str(tmp_path / "unfinished"))
    assert "give one of the two" in refused("merge")
    shutil.copytree(place / "runs" / "recipe" / "adapter", tmp_path / "carried")
    assert "expected --out DIR" in refused("merge", str(tmp_path / "carried"))
    assert 'found "lots"' in refused("merge", str(place / "runs" / "recipe"), "--max-shard-size", "lots")
    assert "leave out --onto" in refused("merge", str(place / "runs" / "recipe"), "--compare", "--onto", "packed")


def test_damaged_adapter_is_refused(place, tmp_path):
    shutil.copytree(place / "runs" / "recipe" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    done = quantune_command("merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "m"))
    assert done.returncode == 5 and "adapter_model.safetensors is damaged" in done.stderr


def test_adapter_with_nan_names_the_tensor(place, tmp_path):
    shutil.copytree(place / "runs" / "recipe" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[5]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    (tmp_path / "adapter" / "manifest.json").unlink()
    said = refused("merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "m"))
    assert f"holds NaN or infinity in 1 of its tensors, e.g. {name}" in said and not (tmp_path / "m").exists()


def test_base_in_a_format_without_a_packer_is_named(place, tmp_path):
    base = with_tokenizer(place / "base", tmp_path / "gptq")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "runs" / "recipe" / "adapter", adapter)
    for name in ("recipe.toml", "run.json", "manifest.json"):
        (adapter / name).unlink()
    said = refused("merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "m"))
    assert "ships quantized (gptq), a format that quantune has no packer for" in said


def test_several_adapters_with_weights(place, tmp_path):
    adapter = str(place / "runs" / "recipe" / "adapter")
    arguments = ("--adapter", f"{adapter}:0.25", "--adapter", f"{adapter}:0.75", "--out", str(tmp_path / "m"), "--json")
    done = quantune_command("merge", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["found"]["agreement"] > 0.9
    assert "expected FOLDER:WEIGHT with a number" in refused("merge", "--adapter", f"{adapter}:half", "--out", "m")
