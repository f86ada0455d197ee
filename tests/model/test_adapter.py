"""Adapters are PEFT adapters: targets, initialization, round trips, merging."""

import json

import pytest
import torch
from peft import PeftModel
from support import base_of, quantization
from transformers import AutoModelForCausalLM

from quantune.backends.backend import pack_weight
from quantune.errors import ModelError
from quantune.model import adapter, targets
from quantune.model.base import skeleton
from quantune.model.load import load_model
from quantune.model.lora_layer import QuantLoraLinear
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig
from quantune.training.loss import build_loss

TOKENS = torch.arange(30).view(2, 15) % 300


def load(folder, weight_dtype="nf4", dtype=torch.float32):
    plan = quantization(weight_dtype=weight_dtype)
    return load_model(base_of(folder), plan, compute_dtype=dtype, device=torch.device("cpu"))


def trained(folder, config, weight_dtype="nf4", dtype=torch.float32):
    """An adapter whose every tensor has moved from its initialization."""
    model = adapter.attach(load(folder, weight_dtype, dtype), config, base_name=str(folder), seed=3)
    torch.manual_seed(4)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def dequantized(folder, weight_dtype="nf4"):
    """transformers' own model on the dequantized base."""
    packed = load(folder, weight_dtype)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize()
    return dense


CONFIGS = {
    "lora": AdapterConfig(r=8),
    "rslora": AdapterConfig(r=8, use_rslora=True),
    "dora": AdapterConfig(r=8, use_dora=True),
    "suffixes": AdapterConfig(r=4, targets=("q_proj", "mlp.down_proj")),
    "pattern": AdapterConfig(r=4, targets=r".*layers\.1\..*(k|v)_proj"),
    "head saved": AdapterConfig(r=4, modules_to_save=("lm_head",)),
    "head adapted": AdapterConfig(r=4, targets=("all-linear", "lm_head")),
    "embedding adapted": AdapterConfig(r=4, targets=("q_proj", "embed_tokens"), dropout=0.1),
    "dora on both": AdapterConfig(r=4, targets=("embed_tokens", "lm_head"), use_dora=True),
}


@pytest.mark.parametrize("weight_dtype", ["nf4", "int8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_adapter_answers_alike_in_plain_peft(llama, tmp_path, config, weight_dtype):
    model = trained(llama, config, weight_dtype)
    adapter.save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(dequantized(llama, weight_dtype), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_adapter_loads_on_the_packed_base(llama, tmp_path, config):
    model = trained(llama, config)
    adapter.save_adapter(model, tmp_path)
    loaded = adapter.load_adapter(load(llama), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)


def test_saving_twice_gives_the_same_bytes(llama, tmp_path):
    for name in ("one", "two"):
        adapter.save_adapter(trained(llama, CONFIGS["lora"]), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_only_the_adapter_is_trained_and_in_fp32(llama):
    model = adapter.attach(load(llama), AdapterConfig(), base_name="b", seed=0)
    trainable = adapter.trainable_parameters(model)
    assert all("lora_" in name for name in trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}


def test_a_fresh_adapter_changes_nothing(llama):
    base = load(llama)
    with torch.no_grad():
        before = base(TOKENS).logits
        model = adapter.attach(base, AdapterConfig(), base_name="b", seed=0).eval()
        assert torch.equal(model(TOKENS).logits, before)


def test_the_seed_decides_the_initialization(llama):
    def first(seed):
        model = adapter.attach(load(llama), AdapterConfig(), base_name="b", seed=seed)
        return next(iter(adapter.trainable_parameters(model).values()))

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_dropout_acts_in_training_only(llama):
    model = trained(llama, AdapterConfig(r=8, dropout=0.5))
    plain = trained(llama, AdapterConfig(r=8))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
        model.train()
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_gradients_equal_those_of_plain_peft_on_the_dequantized_base(llama, tmp_path, name):
    model = trained(llama, CONFIGS[name])
    adapter.save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(dequantized(llama), tmp_path, is_trainable=True).eval()
    for one in (model, plain):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in adapter.trainable_parameters(model).items()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_peft_merges_into_the_packed_weight_and_refuses_to_undo_it(llama):
    model = trained(llama, CONFIGS["lora"], "int8")
    with torch.no_grad():
        before = model(TOKENS).logits
        layer = next(module for module in model.modules() if isinstance(module, QuantLoraLinear))
        model.merge_adapter()
        merged = model(TOKENS).logits
    assert (merged - before).norm() / before.norm() < 0.05  # one more rounding to 8 bit
    with pytest.raises(RuntimeError, match="can't be undone"):
        layer.unmerge()


@pytest.mark.parametrize("name", ["lora", "dora"])
@torch.no_grad()
def test_peft_merges_to_the_bytes_of_a_packed_merge_whatever_it_computes_in(llama, name):
    model = trained(llama, CONFIGS[name], dtype=torch.bfloat16)
    expected = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLoraLinear):
            weight_format = layer.get_base_layer().weight_format
            merged = layer.get_base_layer().dequantize(torch.float32)
            merged += layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            if name == "dora":
                merged *= (layer.lora_magnitude_vector["default"].weight / merged.norm(dim=1))[:, None]
            options, dtype = weight_format.layout.options, weight_format.layout.dtype
            expected[path] = pack_weight(weight_format.backend, merged.to(dtype), options).data
    model.merge_adapter()
    assert len(expected) == 7 * 2
    for path, data in expected.items():
        assert torch.equal(model.get_submodule(path).get_base_layer().weight, data), path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(targets=("q_porj",)), r'"q_porj" matches no linear layer \(did you mean "q_proj"\?\)'),
        (AdapterConfig(targets=("q_proj", "nothing")), r'"nothing" matches no linear layer.*down_proj \(x2\)'),
        (AdapterConfig(targets="q_proj"), r"a string is one regular expression over whole names"),
        (AdapterConfig(targets="(.*"), "expected a regular expression"),
        (AdapterConfig(targets=()), "targets is an empty list"),
        (AdapterConfig(targets=("all-linear", "lm_haed")), r'"lm_haed" matches no .* \(did you mean "lm_head"\?\)'),
        (AdapterConfig(modules_to_save=("lm_haed",)), r'found "lm_haed", .* \(did you mean "lm_head"\?\)'),
    ],
)
def test_targets_that_match_nothing_list_the_linear_layers_there_are(llama, config, message):
    with pytest.raises(ModelError, match=message):
        targets.match_targets(skeleton(base_of(llama)), config)


def test_all_linear_leaves_the_output_head_out(llama):
    matched = targets.match_targets(skeleton(base_of(llama)), AdapterConfig())
    assert len(matched) == 14 and "lm_head" not in matched


def test_a_list_unites_all_linear_with_what_it_names_beside(llama):
    meta = skeleton(base_of(llama))
    both = targets.match_targets(meta, AdapterConfig(targets=("all-linear", "lm_head", "embed_tokens")))
    assert sorted({*both} - {*targets.match_targets(meta, AdapterConfig())}) == ["lm_head", "model.embed_tokens"]
    model = adapter.attach(load(llama), AdapterConfig(targets=("all-linear", "lm_head")), base_name="b", seed=0)
    assert sorted(model.targeted_module_names) == sorted({*both} - {"model.embed_tokens"})


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("names", [("q_proj", "lm_head"), ("embed_tokens",), ("embed_tokens", "lm_head")])
def test_a_tied_embedding_and_head_are_adapted_apart(tied_llama, tmp_path, names):
    model = trained(tied_llama, AdapterConfig(targets=names))
    adapter.save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(dequantized(tied_llama), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("named", "saved"),
    [
        (("embed_tokens", "q_proj"), "model.embed_tokens"),
        (("all-linear", "model.embed_tokens"), "embed_tokens"),
        (("mlp.up_proj",), "mlp"),
        (r".*layers\.1\..*up_proj", "layers.1.mlp"),
    ],
)
def test_what_is_trained_in_full_is_not_adapted_by_name(llama, named, saved):
    with pytest.raises(ModelError, match=rf'targets covers "model.*", which modules_to_save = \["{saved}"\] trains in'):
        targets.match_targets(skeleton(base_of(llama)), AdapterConfig(targets=named, modules_to_save=(saved,)))
    everything = AdapterConfig(modules_to_save=(saved,))
    assert targets.match_targets(skeleton(base_of(llama)), everything)  # which leaves it out


def test_one_tied_weight_is_not_adapted_and_trained_in_full(tied_llama):
    config = AdapterConfig(targets=("q_proj", "lm_head"), modules_to_save=("embed_tokens",))
    with pytest.raises(ModelError, match='covers "lm_head" and modules_to_save "embed_tokens", which are one weight'):
        targets.match_targets(skeleton(base_of(tied_llama)), config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_embeddings_and_the_head_give_no_share_to_an_initialization(llama, init):
    config = AdapterConfig(targets=("q_proj", "embed_tokens"), init=init)
    with pytest.raises(ModelError, match=f'init = "{init}" takes a share .* leave "embed_tokens" out of targets'):
        targets.match_targets(skeleton(base_of(llama)), config)


def test_a_folder_without_an_adapter_and_a_pickled_one_are_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="found no adapter_config.json"):
        adapter.load_adapter(load(llama), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="does not read pickled adapters"):
        adapter.load_adapter(load(llama), tmp_path)


@pytest.mark.parametrize(
    "config", [AdapterConfig(r=4), AdapterConfig(r=4, modules_to_save=("lm_head", "embed_tokens"))]
)
def test_a_bf16_base_trains_fp32_adapters(llama, config):
    plan = quantization()
    base = load_model(base_of(llama), plan, compute_dtype=torch.bfloat16, device=torch.device("cpu"))
    model = adapter.attach(base, config, base_name="b", seed=0)
    loss = build_loss(model.get_base_model())(TOKENS, TOKENS)
    loss.backward()
    trained = adapter.trainable_parameters(model).values()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)


def test_a_loaded_adapter_on_a_bf16_base_answers_as_it_did_in_training(llama, tmp_path):
    model = trained(llama, AdapterConfig(r=4, modules_to_save=("lm_head", "embed_tokens")), dtype=torch.bfloat16)
    adapter.save_adapter(model, tmp_path)
    loaded = adapter.load_adapter(load(llama, dtype=torch.bfloat16), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_pattern_never_reaches_the_output_head_or_anything_but_linear_layers(llama):
    model = adapter.attach(load(llama), AdapterConfig(targets=r".*(layers\.0.*|lm_head)"), base_name="b", seed=0)
    names = {name for name in adapter.trainable_parameters(model) if "lora_A" in name}
    assert len(names) == 7 and all("layers.0" in name for name in names)


def test_packed_modules_can_not_be_trained_in_full(llama):
    with pytest.raises(ModelError, match=r"keep it in full precision with \[quantization\] skip"):
        adapter.attach(load(llama), AdapterConfig(modules_to_save=("down_proj",)), base_name="b", seed=0)


def test_a_tied_embedding_and_head_trained_in_full_stay_tied(tied_llama):
    config = AdapterConfig(modules_to_save=("lm_head", "embed_tokens"))
    model = adapter.attach(load(tied_llama), config, base_name="b", seed=0)
    full = [parameter for name, parameter in adapter.trainable_parameters(model).items() if "lora" not in name]
    assert len({parameter.data_ptr() for parameter in full}) == 1
