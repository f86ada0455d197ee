"""Fused experts: packed with every format, computed as the architecture computes them."""

import pytest
import torch
from model.conftest import MIXTURES
from peft import PeftModel
from support import FORMATS, base_of, dequantize_expert, quantization
from torch import nn
from transformers import AutoModelForCausalLM

from quantune.errors import ModelError, QuantizationError
from quantune.model import adapter, targets
from quantune.model.load import load_model, module_table, packed_fingerprint, packed_weights
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)


def load(folder, **plan):
    return load_model(base_of(folder), quantization(**plan), compute_dtype=torch.float32, device=CPU)


def dense_reference(folder, model):
    """transformers' own model and experts with the dequantized weights of `model` in place."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    for name, module in model.named_modules():
        dense = reference.get_submodule(name)
        if isinstance(module, QuantLinear):
            dense.weight.data = module.dequantize()
        for leaf in experts.weight_formats(module):
            each = [dequantize_expert(module, leaf, index, torch.float32) for index in range(module.num_experts)]
            stored = [experts.as_rows(module, weight) for weight in each]  # back the way the architecture stores it
            dense.get_parameter(leaf).data = torch.stack(stored).contiguous()
    return reference


def expert_modules(model):
    return [module for module in model.modules() if experts.is_experts(module)]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_packed_and_answer_as_transformers_does_on_the_dequantized_weights(mixtures, name):
    model = load(mixtures[name])
    modules = expert_modules(model)
    assert modules and all(
        weight.dtype == torch.uint8 and weight.shape[0] == 4
        for module in modules
        for weight in experts.projections(module).values()
    )
    reference = dense_reference(mixtures[name], model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_format_stores_experts(mixtures, name, plan):
    model = load(mixtures[name], **plan)
    reference = dense_reference(mixtures[name], model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-5, atol=1e-5)
    bits = [row.dtype for row in module_table(model) if "Experts" in row.kind]
    assert any("bits" in dtype for dtype in bits)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_packed_as_it_would_be_alone(mixtures, name):
    model = load(mixtures[name], backend="torchao", weight_dtype="int8")
    dense = AutoModelForCausalLM.from_pretrained(mixtures[name], dtype=torch.float32)
    for path, module in model.named_modules():
        for leaf, weight_format in experts.weight_formats(module).items():
            original = dense.get_submodule(path).get_parameter(leaf)
            for index in range(4):
                alone = weight_format.backend.pack(
                    experts.as_rows(module, original[index]).contiguous(), weight_format.layout.options
                )
                assert torch.equal(weight_format.layout.write(alone), module.get_parameter(leaf)[index])


def test_gradients_reach_what_comes_before_the_experts(mixtures):
    model = load(mixtures["mixtral"])
    reference = dense_reference(mixtures["mixtral"], model)
    found, expected = [], []
    for one, grads in ((model, found), (reference, expected)):
        embedded = one.get_input_embeddings()(TOKENS).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


def test_skip_keeps_experts_or_one_of_their_weights_in_full_precision(mixtures):
    model = load(mixtures["mixtral"], skip=["experts"])
    assert not any(experts.weight_formats(module) for module in model.modules())
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    partly = load(mixtures["mixtral"], skip=["layers.0.mlp.experts.down_proj"])
    first, second = expert_modules(partly)
    assert set(experts.weight_formats(first)) == {"gate_up_proj"}
    assert set(experts.weight_formats(second)) == {"gate_up_proj", "down_proj"}
    reference = dense_reference(mixtures["mixtral"], partly)
    with torch.no_grad():
        torch.testing.assert_close(partly(TOKENS).logits, reference(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_bytes_of_experts_are_part_of_the_fingerprint(mixtures):
    model = load(mixtures["mixtral"])
    before = packed_fingerprint(model)
    assert before == packed_fingerprint(load(mixtures["mixtral"]))
    expert_modules(model)[0].down_proj.data[3, 0] ^= 1
    assert packed_fingerprint(model) != before


def test_the_table_counts_the_weights_of_experts(mixtures):
    model = load(mixtures["mixtral"])
    dense = AutoModelForCausalLM.from_pretrained(mixtures["mixtral"])
    assert sum(row.weights for row in module_table(model)) == sum(p.numel() for p in dense.parameters())


def test_no_weight_of_the_mixture_is_left_in_full_precision_but_routers_embeddings_and_norms(mixtures):
    model = load(mixtures["deepseek_v3"])
    packed = {f"{name}.{leaf}" for name, module in model.named_modules() for leaf in packed_weights(module)}
    left = {name for name, p in model.named_parameters() if p.dim() > 1 and name not in packed}
    assert {name.rpartition("layers.")[2] for name in left} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "1.mlp.gate.weight",
    }


def test_shapes_a_format_can_not_store_are_all_named_before_anything_is_loaded(mixtures):
    with pytest.raises(
        QuantizationError, match=r"can't store 10 weights of this base: .*group_size = 128 does not divide"
    ) as caught:
        load(mixtures["mixtral"], backend="torchao", weight_dtype="int4")
    assert "q_proj (and 9 more): group_size = 128 does not divide its 64 in features" in str(caught.value)
    assert "group_size = 32 or 64 would" in str(caught.value)
    assert 'skip = ["gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]' in str(caught.value)


def test_a_token_without_experts_gets_nothing(mixtures):
    """transformers marks slots that belong to another process by the number of experts."""
    module = expert_modules(load(mixtures["mixtral"]))[0]
    hidden = torch.randn(3, 64)
    index = torch.tensor([[0, 1], [4, 4], [2, 4]])
    weights = torch.full((3, 2), 0.5)
    out = experts.packed_experts(module, hidden, index, weights)
    assert not out[1].any() and out[0].any() and out[2].any()
    assert not experts.packed_experts(module, hidden, torch.full((3, 2), 4), weights).any()


def test_a_damaged_expert_is_named(mixtures, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixtures["mixtral"])
    expert_modules(model)[1].down_proj.data[2, 0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"layers.1.mlp.experts.down_proj\[2\]: can't be packed, it holds NaN"):
        load(tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_on_all_linear_layers_leaves_the_experts_to_the_base(mixtures, name, tmp_path):
    base = load(mixtures[name])
    wanted = targets.match_targets(base, AdapterConfig())
    model = adapter.attach(base, AdapterConfig(r=2), base_name="b", seed=0)
    adapted = [path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(wanted) and adapted
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable_parameters(model).values())
    adapter.save_adapter(model, tmp_path)
    loaded = adapter.load_adapter(load(mixtures[name]), tmp_path)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, loaded.eval()(TOKENS).logits)
    dense = AutoModelForCausalLM.from_pretrained(mixtures[name], dtype=torch.float32)
    assert len(PeftModel.from_pretrained(dense, tmp_path).targeted_module_names) == len(wanted)


def test_names_that_peft_takes_for_experts_are_no_targets(mixtures):
    """DeepSeek has dense and shared `up_proj` beside the experts; PEFT would adapt the experts in their place."""
    base = load(mixtures["deepseek_v3"])
    assert {name.rpartition(".")[2] for name in targets.left_out(base)} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ModelError, match='PEFT takes "up_proj" for the fused weights'):
        targets.match_targets(base, AdapterConfig(targets=("q_b_proj", "up_proj")))
    assert targets.left_out(load(mixtures["gpt_oss"])) == []


def test_experts_are_no_linear_layers():
    assert not experts.is_experts(nn.Linear(2, 2))


def test_packed_experts_can_not_be_trained_in_full(mixtures):
    with pytest.raises(ModelError, match='"experts" is packed'):
        adapter.attach(load(mixtures["mixtral"]), AdapterConfig(modules_to_save=("experts",)), base_name="b", seed=0)
