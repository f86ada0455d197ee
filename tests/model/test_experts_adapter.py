"""Adapters on fused experts: PEFT adapters over packed and dense weights, and what they can't be put on."""

import attrs
import pytest
import torch
from model.conftest import MIXTURES
from model.test_experts import dense_reference, expert_modules
from peft import PeftModel
from support import base_of, quantization
from transformers import Llama4ForCausalLM, Llama4TextConfig

from quantune.errors import ModelError
from quantune.model import adapter, targets
from quantune.model.base import skeleton
from quantune.model.load import check_plan, load_model, module_table, packed_weights
from quantune.model.lora_experts import ParamWrapper
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig
from quantune.training.loss import build_loss

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)
BOTH = AdapterConfig(r=4, target_parameters=("experts.gate_up_proj", "experts.down_proj"))
WITHOUT_EXPERTS = attrs.evolve(quantization(), experts=False)


def load(folder, plan, dtype=torch.float32):
    return load_model(base_of(folder), plan, compute_dtype=dtype, device=CPU)


def trained(folder, plan, config=BOTH, dtype=torch.float32):
    """An adapter whose every tensor has moved from its initialization."""
    model = adapter.attach(load(folder, plan, dtype), config, base_name="b", seed=0)
    torch.manual_seed(1)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def gradients(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = {name: parameter.grad for name, parameter in adapter.trainable_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return found


PLANS = {"packed": quantization(), "experts dense": WITHOUT_EXPERTS, "all dense": None}
CASES = [
    *((name, "packed", BOTH) for name in MIXTURES),
    ("mixtral", "all dense", BOTH),
    ("gpt_oss", "experts dense", BOTH),
    ("qwen3_moe", "packed", AdapterConfig(r=2, targets=(), target_parameters=("down_proj",), use_rslora=True)),
    ("qwen3_moe", "packed", AdapterConfig(targets=("q_proj",), target_parameters=("1.mlp.experts.gate_up_proj",))),
    ("gpt_oss", "packed", attrs.evolve(BOTH, init="gaussian", bias="lora_only")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "plan", "config"), CASES)
def test_plain_peft_loads_the_adapter_and_has_the_same_answers_and_gradients(mixtures, tmp_path, name, plan, config):
    model = trained(mixtures[name], PLANS[plan], config)
    adapter.save_adapter(model, tmp_path)
    reference = dense_reference(mixtures[name], load(mixtures[name], PLANS[plan]))
    plain = PeftModel.from_pretrained(reference, tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)
    if config.bias == "none":
        found, expected = gradients(model), gradients(plain)
        assert found.keys() == expected.keys() and any("experts" in key for key in found)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_saved_adapter_loads_on_the_packed_base(mixtures, tmp_path, name):
    model = trained(mixtures[name], quantization())
    adapter.save_adapter(model, tmp_path)
    loaded = adapter.load_adapter(load(mixtures[name], quantization()), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)


def test_saving_twice_gives_the_same_bytes(mixtures, tmp_path):
    for name in ("one", "two"):
        adapter.save_adapter(trained(mixtures["mixtral"], quantization()), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_gradient_and_all_are_fp32(mixtures, dtype):
    model = trained(mixtures["qwen3_moe"], quantization(), dtype=dtype).train()
    expected = gradients(model)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
        assert torch.equal(gradient, expected[key])


def test_training_takes_the_chunked_loss_and_lowers_it(mixtures):
    model = adapter.attach(load(mixtures["mixtral"], quantization()), BOTH, base_name="b", seed=0).train()
    loss = build_loss(model.get_base_model())
    of_experts = {name: p for name, p in adapter.trainable_parameters(model).items() if "experts" in name}
    optimizer = torch.optim.AdamW(of_experts.values(), lr=1e-2)
    values = []
    for _ in range(6):
        value = loss(TOKENS, TOKENS)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values[-1] < 0.97 * values[0]


def test_a_fresh_or_disabled_adapter_changes_nothing_and_leaves_no_update_behind(mixtures):
    base = load(mixtures["mixtral"], quantization())
    with torch.no_grad():
        before = base(TOKENS).logits
        model = adapter.attach(base, BOTH, base_name="b", seed=0).eval()
        assert torch.equal(model(TOKENS).logits, before)
        for parameter in adapter.trainable_parameters(model).values():
            parameter += 0.1
        assert not torch.equal(model(TOKENS).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, before)
    assert not any(module.low_rank_updates for module in expert_modules(model))


def test_peft_merges_into_packed_experts_and_refuses_to_undo_it(mixtures):
    config = attrs.evolve(BOTH, targets=())
    model = trained(mixtures["gpt_oss"], quantization(weight_dtype="int8"), config)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(TOKENS).logits
        before = model(TOKENS).logits
        model.merge_adapter()
        merged = model(TOKENS).logits
    assert (merged - before).norm() < 0.1 * (before - base).norm()
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    with pytest.raises(RuntimeError, match="can't be undone"):
        wrapper.unmerge()


def test_another_function_for_the_experts_would_leave_the_update_out_and_is_refused(mixtures):
    model = trained(mixtures["mixtral"], None)
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match='needs experts_implementation = "quantune", found "eager"'):
        model(TOKENS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("experts.gate_up_porj",), r'"experts.gate_up_porj" matches no .* \(did you mean "gate_up_proj"\?\)'),
        (("experts.down_proj", "q_proj.weight"), r'"q_proj.weight" matches no weight of experts.*layers.0.mlp.experts'),
        (("mlp.gate.weight",), '"mlp.gate.weight" matches no weight of experts'),
    ],
)  # fmt: skip
def test_a_name_that_matches_no_weight_of_experts_lists_those_there_are(mixtures, names, message):
    with pytest.raises(ModelError, match=message):
        targets.match_parameters(skeleton(base_of(mixtures["mixtral"])), names)


def test_a_model_without_experts_or_with_experts_of_its_own_kind_is_refused_by_name(llama):
    with pytest.raises(ModelError, match="LlamaForCausalLM has no fused experts; leave target_parameters out"):
        targets.match_parameters(skeleton(base_of(llama)), ("experts.down_proj",))
    config = Llama4TextConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_local_experts=2)
    with torch.device("meta"):
        llama4 = Llama4ForCausalLM(config)
    with pytest.raises(ModelError, match="is a weight of Llama4TextExperts, which computes its experts in a way of"):
        targets.match_parameters(llama4, ("experts.down_proj",))


def test_an_adapter_on_the_whole_module_of_experts_is_refused(mixtures, tmp_path):
    model = trained(mixtures["mixtral"], quantization())
    adapter.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"q_proj"', '"experts"'))
    with pytest.raises(ModelError, match="of the fused experts as a target, found the module that holds them"):
        adapter.load_adapter(load(mixtures["mixtral"], quantization()), tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_without_experts_the_rest_is_packed_and_counted_right(mixtures, name):
    model = load(mixtures[name], WITHOUT_EXPERTS)
    assert not any(packed_weights(module) for module in expert_modules(model))
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    dense = load(mixtures[name], None)
    assert sum(row.weights for row in module_table(model)) == sum(p.numel() for p in dense.parameters())
    (row,) = [row for row in module_table(model) if "Experts" in row.kind]
    assert row.dtype == "float32"
    reference = dense_reference(mixtures[name], model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_plan_without_experts_that_packs_nothing_says_so(mixtures):
    plan = attrs.evolve(quantization(skip=["self_attn"]), experts=False)
    with pytest.raises(ModelError, match=r'nothing is packed: .*skip = \["self_attn"\], experts = false'):
        check_plan(skeleton(base_of(mixtures["mixtral"])), plan, CPU)


def test_experts_that_a_checkpoint_holds_packed_are_not_unpacked_by_experts_false(mixtures):
    meta = skeleton(base_of(mixtures["mixtral"]))
    plan = attrs.evolve(quantization(backend="fp8"), experts=False)
    with pytest.raises(ModelError, match=r"already holds its experts packed, e.g. model.layers.0.mlp.experts.gate_up"):
        check_plan(meta, plan, CPU, {"quant_method": "fp8"})
    check_plan(meta, plan, CPU, {"quant_method": "fp8", "modules_to_not_convert": ["experts"]})


@pytest.mark.parametrize(
    ("plan", "config", "refused"),
    [
        (quantization(skip=["self_attn"]), AdapterConfig(), True),
        (quantization(skip=["self_attn"]), BOTH, False),
        (quantization(skip=["layers.0"]), AdapterConfig(), False),
        (WITHOUT_EXPERTS, attrs.evolve(BOTH, targets=()), True),
        (WITHOUT_EXPERTS, BOTH, False),
        (quantization(skip=["self_attn"]), AdapterConfig(targets=("lm_head",)), False),
    ],
)
def test_an_adapter_on_nothing_but_what_the_recipe_keeps_dense_is_refused(mixtures, plan, config, refused):
    meta = skeleton(base_of(mixtures["mixtral"]))
    if not refused:
        targets.require_packed_target(meta, config, plan)
        return
    with pytest.raises(ModelError, match="keeps everything in full precision that the adapter is put on"):
        targets.require_packed_target(meta, config, plan)


def test_what_a_checkpoint_itself_keeps_dense_may_be_all_that_is_adapted(mixtures):
    """gpt-oss holds its experts as MXFP4 and all else in full precision, and that is what is adapted."""
    stored = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}
    meta = skeleton(base_of(mixtures["gpt_oss"]))
    targets.require_packed_target(meta, AdapterConfig(), quantization(backend="mxfp4"), stored)


def test_only_experts_that_got_tokens_are_dequantized(mixtures, monkeypatch):
    model = trained(mixtures["mixtral"], quantization(), attrs.evolve(BOTH, targets=()))
    module = expert_modules(model)[0]
    seen = []
    weight_format = experts.weight_formats(module)["down_proj"]
    backend = weight_format.backend
    original = type(backend).dequantize

    def counting(self, packed, dtype, out=None):
        seen.append(packed.layout.shape)
        return original(self, packed, dtype, out)

    monkeypatch.setattr(type(backend), "dequantize", counting)
    wrapper = model.get_base_model().model.layers[0].mlp.experts
    hidden = torch.randn(3, 64, requires_grad=True)
    out = wrapper(hidden, torch.tensor([[1], [1], [3]]), torch.ones(3, 1))
    out.sum().backward()
    assert len(seen) == 2 * 2 * 2  # two experts, two weights, forward and backward
