"""How a merged checkpoint is written: in files like the base's, whole or not at all."""

import json
import shutil

import attrs
import pytest
import torch
from merge.conftest import CPU, Quiet, train
from merge.test_exact import EXPERTS, answers
from safetensors.torch import load_file, save_file
from support import quantization
from transformers import AutoTokenizer

from quantune.errors import CheckpointError, FolderInUseError, InputError, ModelError
from quantune.merge.merge import merge
from quantune.streaming import output as output_module
from quantune.streaming.output import open_output
from quantune.streaming.writer import ShardWriter

NF4 = quantization(weight_dtype="nf4")


@pytest.fixture(scope="module")
def sharded(bases, tmp_path_factory):
    """A mixture whose experts are spread over three files, so that one expert's weights lie in two."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(bases["qwen3_moe"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for part in range(3):
        file = f"model-0000{part + 1}-of-00003.safetensors"
        held = names[part::3]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def on_shards(sharded, tmp_path_factory):
    return train(sharded, tmp_path_factory.mktemp("on shards") / "adapter", NF4, target_parameters=EXPERTS)


@pytest.fixture(scope="module")
def on_llama(bases, tmp_path_factory):
    return train(bases["llama"], tmp_path_factory.mktemp("on llama") / "adapter", NF4)


def test_files_are_like_those_of_the_base(on_shards, sharded, tmp_path):
    merged = on_shards.merge(tmp_path / "merged")
    for path in sharded.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(merged / path.name).keys()
    index, base = (json.loads((one / "model.safetensors.index.json").read_text()) for one in (merged, sharded))
    assert index["weight_map"] == base["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for p in merged.glob("*.safetensors") for t in load_file(p).values()
    )
    torch.testing.assert_close(answers(merged), on_shards.logits, rtol=1e-4, atol=1e-4)


def test_files_of_at_most_the_size_that_was_asked_for(on_shards, tmp_path):
    merged = on_shards.merge(tmp_path / "merged", max_shard_size="100KB")
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in merged.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 100_000
    torch.testing.assert_close(answers(merged), on_shards.logits, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_generation_config_come_along(on_llama, bases, tmp_path):
    (bases["llama"] / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (bases["llama"] / "README.md").write_text("about the base")
    merged = on_llama.merge(tmp_path / "merged")
    assert json.loads((merged / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    assert not (merged / "README.md").exists()
    text = "a word"
    assert AutoTokenizer.from_pretrained(merged)(text) == AutoTokenizer.from_pretrained(bases["llama"])(text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_written_in_the_dtype_that_was_asked_for(dtype, on_llama, tmp_path):
    merged = on_llama.merge(tmp_path / "merged", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {dtype}
    assert json.loads((merged / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_weights_are_rounded_once(on_llama, tmp_path):
    exact = load_file(on_llama.merge(tmp_path / "fp32") / "model.safetensors")
    rounded = load_file(on_llama.merge(tmp_path / "bf16", dtype=None) / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def test_overflow_of_fp16_is_said(bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", NF4, alpha=4e8)
    with pytest.raises(ModelError, match=r"q_proj.weight: .* more than fp16 holds; use --dtype bf16|more than fp16"):
        trained.merge(tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()


class Killed(BaseException):
    """Ends a merge as if the process had died."""


class KillsAfter(Quiet):
    """Dies when a number of tensors is written."""

    def __init__(self, tensors):
        super().__init__()
        self.left = tensors

    def wrote(self, nbytes):
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("tensors", [0, 5, 25, 44])
def test_killed_merge_leaves_nothing_under_its_name_and_goes_on(tensors, on_shards, tmp_path):
    undisturbed = on_shards.merge(tmp_path / "undisturbed")
    out = tmp_path / "merged"
    with pytest.raises(Killed):
        merge(on_shards.request(out), CPU, KillsAfter(tensors))
    assert not out.exists()
    left = tmp_path / "merged.partial"
    assert left.is_dir() and not (left / "config.json").exists()
    complete = {path: path.stat().st_mtime_ns for path in left.glob("*.safetensors") if path.name in output_of(left)}
    observer = Quiet()
    merge(on_shards.request(out), CPU, observer)
    assert [note for note in observer.notes if "going on" in note] or not complete
    assert {path.name for path in complete if (out / path.name).stat().st_mtime_ns == complete[path]} == {
        path.name for path in complete
    }
    for path in undisturbed.iterdir():
        if path.name != "merge.json":
            assert path.read_bytes() == (out / path.name).read_bytes()
    assert not left.exists()


def output_of(partial):
    """The files that are complete."""
    return json.loads((partial / output_module.PROGRESS).read_text())["complete"]


def test_another_merge_does_not_go_on_with_what_is_there(on_shards, tmp_path):
    with pytest.raises(Killed):
        merge(on_shards.request(tmp_path / "merged"), CPU, KillsAfter(25))
    observer = Quiet()
    merge(on_shards.request(tmp_path / "merged", dtype=torch.bfloat16), CPU, observer)
    (note,) = observer.notes
    assert note.endswith("merged.partial was of another merge, and is begun anew")
    assert answers(tmp_path / "merged").shape == on_shards.logits.shape


def test_another_recipe_does_not_go_on_with_what_is_there(on_shards, tmp_path):
    """The same files and options: what the recipe says of training counts as well."""
    with pytest.raises(Killed):
        merge(on_shards.request(tmp_path / "merged"), CPU, KillsAfter(25))
    setting = attrs.evolve(on_shards.setting, precision="bf16")
    observer = Quiet()
    merge(attrs.evolve(on_shards.request(tmp_path / "merged"), setting=setting), CPU, observer)
    assert observer.notes[0].endswith("merged.partial was of another merge, and is begun anew")


def test_merge_that_dies_while_it_replaces_another_goes_on(on_llama, tmp_path, monkeypatch):
    """The old folder is aside then, and gone once the new one has its name."""
    on_llama.merge(tmp_path / "merged")
    rename = output_module.os.rename

    def die(source, target):
        if str(source).endswith(".partial"):
            raise Killed
        rename(source, target)

    monkeypatch.setattr(output_module.os, "rename", die)
    with pytest.raises(Killed):
        on_llama.merge(tmp_path / "merged", overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.partial", "merged.replaced"]
    on_llama.merge(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not {"progress.json", ".lock"}.intersection(path.name for path in (tmp_path / "merged").iterdir())


def test_folder_that_exists_is_left_alone(on_llama, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already; --overwrite replaces it"):
        on_llama.merge(tmp_path / "merged")
    with pytest.raises(InputError, match=r"not a folder that this command wrote \(it has no merge.json\)"):
        on_llama.merge(tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_earlier_merge_is_replaced_when_that_is_asked_for(on_llama, tmp_path):
    merged = on_llama.merge(tmp_path / "merged")
    (merged / "old").touch()
    on_llama.merge(merged, overwrite=True)
    assert not (merged / "old").exists() and (merged / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_two_merges_into_one_folder(on_llama, tmp_path):
    with open_output(tmp_path / "merged", report="merge.json", identity={}):
        with pytest.raises(FolderInUseError, match="is being written by process"):
            on_llama.merge(tmp_path / "merged")


def test_full_disk_is_found_before_anything_is_written(on_llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs \d\.\d MiB, and the disk has 1000 bytes free"):
        on_llama.merge(tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_is_a_sentence(on_llama, tmp_path, monkeypatch):
    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(CheckpointError, match="the disk is full .* the same command goes on with it"):
        on_llama.merge(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_writer_writes_what_safetensors_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "matrix": torch.randn(3, 4),
        "half": torch.randn(3).half(),
        "codes": torch.randn(8).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        'quote " and \u00fc': torch.randn(2, 2).bfloat16(),
    }
    writer = ShardWriter(tmp_path / "file.safetensors", frozenset(tensors), {"format": "pt"})
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_writer_notices_a_tensor_that_is_missing(tmp_path):
    writer = ShardWriter(tmp_path / "file.safetensors", frozenset({"a", "b"}))
    writer.add("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="lacks 1 tensors, e.g. b"):
        writer.close()


def test_report_says_what_was_merged(on_llama, tmp_path):
    found = json.loads((on_llama.merge(tmp_path / "merged") / "merge.json").read_text())
    assert found["onto"] == "dequantized" and found["merged"] == 14 and found["dtype"] == "float32"
    assert attrs.asdict(NF4)["options"]["weight_dtype"] == found["quantization"]["options"]["weight_dtype"]


def test_base_of_one_file_with_an_index_stays_one(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    weight_map = dict.fromkeys(load_file(base / name), name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    trained = train(base, tmp_path / "adapter", NF4)
    torch.testing.assert_close(answers(trained.merge(tmp_path / "m")), trained.logits, rtol=1e-4, atol=1e-4)
