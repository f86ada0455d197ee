"""`quantune quantize`: what is written, how it goes on after a crash, and what is refused."""

import json

import pytest
import torch
from model.conftest import MIXTURES, save
from safetensors.torch import load_file, save_file
from support import Silent, base_of, quantization
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from quantune.cli import app
from quantune.errors import BackendError, InputError, ModelError, QuantizationError
from quantune.model.adoption import take_quantization
from quantune.model.base import Base
from quantune.model.load import load_model
from quantune.quantize import quantize as story
from quantune.quantize.choice import choose
from quantune.quantize.quantize import quantize

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A Llama in bf16, in several files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shards")
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).bfloat16().save_pretrained(folder, max_shard_size="60KB")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def pack(source, out, backend="torchao", weight_dtype="int8", *, overwrite=False, shard_size=None, **options):
    choice = choose(backend, weight_dtype, **options)
    return quantize(
        base_of(source),
        choice,
        out,
        device=CPU,
        observer=Silent(),
        overwrite=overwrite,
        max_shard_size=shard_size,
    )


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def test_files_are_like_the_checkpoints_own_and_load_together(shards, tmp_path):
    pack(shards, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    original = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    for key in original:
        name = key if "_proj" not in key else key.replace(".weight", "._weight_qdata")
        assert index[name] == original[key]
    pack(shards, tmp_path / "one", shard_size="1GB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "one"))


def test_everything_that_is_not_packed_is_as_it_was(shards, tmp_path):
    pack(shards, tmp_path / "out", "bnb", "nf4", skip=["layers.1", "down_proj"])
    made, original = tensors_of(tmp_path / "out"), tensors_of(shards)
    packed = {name for name in original if "_proj" in name and "layers.0" in name and "down" not in name}
    assert len(packed) == 6
    for name, tensor in original.items():
        assert torch.equal(made[name], tensor) != (name in packed)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"} <= set(kept)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_figures_are_those_of_the_packed_model(shards, tmp_path):
    made = pack(shards, tmp_path / "out", "torchao", "fp8")
    packed = quantization(backend="torchao", weight_dtype="fp8")
    model = load_model(base_of(shards), packed, compute_dtype=torch.float32, device=CPU)
    original = tensors_of(shards)
    errors = {"up_proj": [], "q_proj": []}
    for name, layer in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in errors:
            weight = original[f"{name}.weight"].float()
            errors[kind].append((layer.dequantize() - weight, weight))
    found = {kind.kind: kind for kind in made.kinds}
    for kind, pairs in errors.items():
        error, weight = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
        assert found[kind].relative_error == pytest.approx(float(error.norm() / weight.norm()), rel=1e-5)
        assert (found[kind].layers, found[kind].weights) == (2, weight.numel())
    assert json.loads((tmp_path / "out" / "quantize.json").read_text())["weights"]["relative_error"] == pytest.approx(
        made.total.relative_error
    )


def test_killed_half_way_it_goes_on_with_the_same_bytes_and_figures(shards, tmp_path, monkeypatch):
    whole = pack(shards, tmp_path / "whole", "bnb", "nf4")
    read, died = story.Copying.tensors, []

    def dying(self, unit):
        if "layers.1.mlp.up_proj" in unit.keys[0]:
            died.append(unit.keys[0])
            raise KeyboardInterrupt
        return read(self, unit)

    monkeypatch.setattr(story.Copying, "tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        pack(shards, tmp_path / "out", "bnb", "nf4")
    assert died and not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    again = []
    monkeypatch.setattr(story.Copying, "tensors", lambda self, unit: again.append(unit) or read(self, unit))
    resumed = pack(shards, tmp_path / "out", "bnb", "nf4")
    assert 0 < len(again) < len(tensors_of(shards))
    assert (resumed.kinds, resumed.total) == (whole.kinds, whole.total)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_killed_half_way_and_called_otherwise_it_begins_anew(shards, tmp_path, monkeypatch):
    read = story.Copying.tensors

    def dying(self, unit):
        if "layers.1.mlp.up_proj" in unit.keys[0]:
            raise KeyboardInterrupt
        return read(self, unit)

    monkeypatch.setattr(story.Copying, "tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        pack(shards, tmp_path / "out", "bnb", "nf4")
    left = {path.name for path in (tmp_path / "out.partial").glob("*.safetensors")}
    monkeypatch.setattr(story.Copying, "tensors", read)
    pack(shards, tmp_path / "out", "bnb", "nf4", shard_size="1GB")
    assert len(left) > 1 and [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_mixture_whose_experts_are_kept_is_read_by_bitsandbytes(tmp_path):
    source = save(MIXTURES["mixtral"](), tmp_path / "in")
    pack(source, tmp_path / "out", "bnb", "nf4", skip=["experts"])
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_folder_that_exists_is_let_be(shards, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        pack(shards, tmp_path / "out")
    with pytest.raises(InputError, match="is not a folder that this command wrote"):
        pack(shards, tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_is_quantized_is_not_quantized_again(shards, tmp_path):
    pack(shards, tmp_path / "out")
    found = base_of(tmp_path / "out")
    stored = take_quantization(found.config)
    values = {name: getattr(found, name) for name in ("name", "source", "revision", "trust_remote_code", "config")}
    base = Base(**values, attn_implementation=None, stored=stored, tokenizer=None)
    with pytest.raises(InputError, match=r"already quantized \(torchao, but for lm_head\).*Choose the unquantized"):
        quantize(base, choose("bnb"), tmp_path / "again", device=CPU, observer=Silent())


def test_a_skip_that_names_nothing_is_refused(shards, tmp_path):
    with pytest.raises(ModelError, match=r'"up_prj" names no module of this base \(did you mean "up_proj"'):
        pack(shards, tmp_path / "out", skip=["up_prj"])


def test_a_weight_that_is_not_a_number_is_named_and_nothing_is_left_under_the_name(shards, tmp_path):
    folder = tmp_path / "in"
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight: can't be packed, it holds NaN"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_one_of_its_weights_is_refused_before_writing(tmp_path):
    folder = tmp_path / "in"
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks weights of its own architecture, e\.g\. model\.layers\.0\.mlp\.up_proj"
    ):
        pack(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_model_without_linear_layers_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path / "in")
    with pytest.raises(ModelError, match="nothing is packed"):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"backend": "bnb", "weight_dtype": "int3"}, BackendError, 'expected one of "nf4", "fp4", "int8"'),
        ({"backend": "bnb", "settings": ["block_size=65"]}, BackendError, "block_size: expected one of 32, 64"),
        ({"backend": "bnb", "settings": ["blocksize=64"]}, BackendError, "blocksize"),
        ({"backend": "bnb", "settings": ["block_size"]}, InputError, "--set: expected key=value"),
        ({"backend": "mxfp4", "weight_dtype": "mxfp4"}, BackendError, "has one format and takes no weight_dtype"),
        ({"backend": "torchao", "weight_dtype": "nvfp4", "settings": ["group_size=32"]}, BackendError, "expected 16"),
        ({"backend": "bnb", "weight_dtype": "nf4", "settings": ['weight_dtype="fp4"']}, InputError, "say the same"),
    ],
)
def test_a_format_that_there_is_not_is_refused_with_those_there_are(arguments, error, said):
    with pytest.raises(error) as caught:
        choose(**arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("activation_dtype", ["nf4", "int4", "mxfp4", "nvfp4", "fp8"])
@pytest.mark.parametrize("backend, weight_dtype", [("torchao", "int8"), ("bnb", "nf4"), ("mxfp4", None)])
def test_activations_that_no_reader_rounds_so_are_refused_with_the_pairs_there_are(
    backend, weight_dtype, activation_dtype
):
    with pytest.raises(InputError, match="no reader can be asked to multiply") as caught:
        choose(backend, weight_dtype, activation_dtype=activation_dtype)
    said = str(caught.value)
    assert "--backend torchao --weight-dtype fp8 --activation-dtype fp8" in said
    assert "int8 layers always round activations" in said and "fp8 layers always round activations" in said


def test_int8_activations_take_one_scale_per_row():
    with pytest.raises(InputError, match="torchao int8 weights in groups of 64 .* with one scale per row"):
        choose("torchao", "int8", settings=["group_size=64"], activation_dtype="int8")


def test_the_folder_of_a_run_is_merged_first(tmp_path):
    (tmp_path / "recipe.toml").touch()
    done = CliRunner().invoke(app, ["quantize", str(tmp_path), "--backend", "bnb", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, InputError)
    assert f"quantune merge {tmp_path} makes a model of it" in str(done.exception)


def test_the_command_prints_the_table_and_writes_a_model_with_its_tokenizer(tmp_path):
    arguments = ["quantize", "builtin:mini", "--backend", "torchao", "--weight-dtype", "int8", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "SNR dB" in done.stdout and "down_proj" in done.stdout and "transformers with torchao" in done.stdout
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "json"), "--json"])
    assert json.loads(done.stdout)["weights"]["layers"] == 28
