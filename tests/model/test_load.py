"""Loading packs what the recipe meant to pack, touches nothing else, and says what came of it."""

import json

import pytest
import torch
from support import base_of, quantization
from transformers import AutoModelForCausalLM

from quantune.errors import ModelError, QuantizationError
from quantune.model.base import open_base, skeleton
from quantune.model.load import check_plan, load_model, module_table, packed_fingerprint
from quantune.model.names import matches
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import ModelConfig

CPU = torch.device("cpu")


def load(folder, plan):
    return load_model(base_of(folder), plan, compute_dtype=torch.float32, device=CPU)


def dense_reference(folder, model):
    """transformers' own model with the dequantized weights of `model` in place."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            reference.get_submodule(name).weight.data = module.dequantize()
    return reference


@pytest.mark.parametrize("architecture", ["llama", "tied_llama"])
@pytest.mark.parametrize("weight_dtype", ["nf4", "fp4", "int8"])
def test_logits_equal_those_of_a_dense_model_on_the_dequantized_weights(architecture, weight_dtype, request):
    folder = request.getfixturevalue(architecture)
    model = load(folder, quantization(weight_dtype=weight_dtype))
    reference = dense_reference(folder, model)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)


def test_everything_but_the_packed_weights_is_bit_equal_to_the_checkpoint(tied_llama):
    model = load(tied_llama, quantization())
    original = dict(AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.uint8:
            assert torch.equal(parameter, original[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_output_head_and_what_skip_names_stay_in_full_precision(llama):
    model = load(llama, quantization(skip=["layers.0", "*.down_proj"]))
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert packed == {
        f"model.layers.1.{leaf}"
        for leaf in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    }


def test_loading_twice_gives_the_same_bytes(llama):
    first, second = load(llama, quantization()), load(llama, quantization())
    assert packed_fingerprint(first) == packed_fingerprint(second)
    assert packed_fingerprint(first) != packed_fingerprint(load(llama, quantization(block_size=128)))


def test_the_table_counts_weights_not_bytes_and_shared_weights_once(tied_llama):
    model = load(tied_llama, quantization())
    reference = AutoModelForCausalLM.from_pretrained(tied_llama)
    assert sum(row.weights for row in module_table(model)) == sum(p.numel() for p in reference.parameters())
    assert any(row.dtype.startswith("nf4 (4.") for row in module_table(model))


def test_without_quantization_the_base_stays_as_it_is(llama):
    model = load(llama, None)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_should_be_packed_and_are_not_fail_the_load(gpt2):
    with pytest.raises(QuantizationError, match="nothing is packed"):
        load(gpt2, quantization())


def test_a_weight_that_is_not_finite_is_named(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"model.layers.1.mlp.up_proj.weight: can't be packed") as caught:
        load(tmp_path, quantization())
    assert isinstance(caught.value, QuantizationError)


def test_missing_weights_are_named(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="lacks weights of its own architecture: model.layers.1.mlp.up_proj.weight"):
        load(tmp_path, quantization())


def test_a_checkpoint_that_is_already_quantized_is_refused_with_its_method(tmp_path):
    from quantune.model import mini

    for file in mini.PATH.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "c4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        open_base(ModelConfig(base=str(tmp_path)))


def test_remote_code_needs_the_flag_as_well():
    with pytest.raises(ModelError, match="--trust-remote-code"):
        open_base(ModelConfig(base="builtin:mini", trust_remote_code=True))


def test_the_skeleton_has_no_weights():
    model = skeleton(open_base(ModelConfig(base="builtin:mini")))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0.mlp.down_proj", "layers.0", True),
        ("model.layers.10.mlp.down_proj", "layers.1", False),
        ("model.layers.0.mlp.down_proj", "*_proj", True),
        ("model.layers.0.mlp.down_proj", "layers.*.mlp", True),
        ("model.layers.0.mlp.down_proj", "layers.mlp", False),
        ("model.layers.0.mlp.down_proj", "down", False),
    ],
)
def test_skip_patterns_match_whole_parts_of_names(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_every_large_weight_is_accounted_for_whatever_module_holds_it(tmp_path):
    """JetMoE's experts are 3-D weights of modules that transformers offers no function for: the load fails by name."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=32,
        intermediate_size=64,
        num_local_experts=4,
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match="still in full precision: .*input_linear"):
        load(tmp_path, quantization(backend="mxfp4"))


def test_what_a_backend_raises_while_packing_is_raised_as_it_is(llama, monkeypatch):
    from quantune.backends.mxfp4.formats import Mxfp4Backend

    def broken(self, weight, options):
        raise ZeroDivisionError("in the backend's own code")

    monkeypatch.setattr(Mxfp4Backend, "pack", broken)
    with pytest.raises(ZeroDivisionError, match="own code"):
        load(llama, quantization(backend="mxfp4"))


@pytest.mark.parametrize("weight_dtype", ["nf4", "fp8", "int8"])
def test_a_base_trained_in_bf16_packs_to_the_same_bytes_where_it_is_computed_in_fp32(llama, weight_dtype):
    plan = quantization(backend="torchao", weight_dtype=weight_dtype)
    trained = load_model(base_of(llama), plan, compute_dtype=torch.bfloat16, device=CPU)
    asked = load_model(base_of(llama), plan, compute_dtype=torch.float32, device=CPU, pack_dtype=torch.bfloat16)
    assert packed_fingerprint(asked) == packed_fingerprint(trained)
    assert asked(torch.arange(8)[None]).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"skip": ["layers.0", "nothing.here"]},
            r'skip: "nothing.here" names no module of this base; the linear layers',
        ),
        ({"skip": ["mlp.dwon_proj"]}, r'"mlp.dwon_proj" names no module .*\(did you mean "down_proj"\?\)'),
        ({"skip": ["*"]}, r"nothing is packed: .* Leave \[quantization\] out"),
        ({"backend": "torchao", "weight_dtype": "int4"}, "group_size = 128 does not divide its 64 in features"),
    ],
)
def test_what_can_not_be_packed_as_asked_is_known_before_any_weight_is_read(llama, plan, message):
    with pytest.raises(ModelError, match=message) as caught:
        check_plan(skeleton(base_of(llama)), quantization(**plan), CPU)
    assert caught.value.exit_code == 2
    check_plan(skeleton(base_of(llama)), quantization(skip=["layers.0", "*.down_proj"]), CPU)
