"""Quantization-aware training of fused experts: each expert and its update are rounded together."""

import pytest
import torch
from model.test_experts_adapter import BOTH, CPU, TOKENS, gradients
from support import base_of, dequantize_expert, quantization

from quantune.backends.backend import pack_weight
from quantune.errors import ModelError
from quantune.model import adapter, qat
from quantune.model.base import skeleton
from quantune.model.load import load_model
from quantune.model.lora_experts import ParamWrapper
from quantune.quantized import experts
from quantune.recipe.schema import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    QatConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)


def recipe(folder, **config):
    return Recipe(
        model=ModelConfig(base=str(folder)),
        quantization=quantization(),
        adapter=AdapterConfig(r=4, targets=("q_proj",), target_parameters=BOTH.target_parameters),
        data=DataConfig(train=(SourceConfig(path="nowhere.jsonl", format="chat"),)),
        training=TrainingConfig(qat=QatConfig(**config)),
    )


def plan_of(base, made):
    return qat.plan_rounding(skeleton(base), made.training.qat, made.quantization, made.adapter, base.stored)


def built(made):
    base = base_of(made.model.base)
    plan = plan_of(base, made)
    model = load_model(base, plan.stored, compute_dtype=torch.float32, device=CPU)
    model = adapter.attach(model, made.adapter, base_name="b", seed=0, rounds=True)
    qat.round_layers(model, plan, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.train()


@torch.no_grad()
def put_merged_into_base(wrapper):
    """Leave in the base what base and adapter come to, as the format rounds it."""
    holder, leaf, update = wrapper.get_base_layer(), wrapper.parameter_name, wrapper.update_of("default")
    data, packed = holder.get_parameter(leaf).data, experts.weight_formats(holder).get(leaf)
    weight_format, _ = holder.rounded_updates[leaf]
    for expert in range(holder.num_experts):
        rows = dequantize_expert(holder, leaf, expert)
        merged = rows + update.scaling * (update.lora_B[expert] @ update.lora_A[expert])
        made = pack_weight(weight_format.backend, merged, weight_format.layout.options).data
        if packed is None:
            rows.copy_(weight_format.dequantize(made, torch.float32))
        else:
            data[expert] = made


@pytest.mark.parametrize("lora_base", ["dense", "packed"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # rows out, and transposed with biases
def test_experts_compute_with_the_bytes_that_a_packed_merge_writes(mixtures, name, lora_base):
    model = built(recipe(mixtures[name], lora_base=lora_base))
    with torch.no_grad():
        rounded = model(TOKENS).logits
        with model.disable_adapter():
            assert not torch.equal(model(TOKENS).logits, rounded)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 2 * 2
    for wrapper in wrappers:
        put_merged_into_base(wrapper)
    for wrapper in wrappers:
        wrapper.lora_B["default"].weight.data.zero_()
        wrapper.get_base_layer().rounded_updates = {}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, rounded)


def test_inputs_of_packed_experts_are_not_rounded(mixtures):
    made = recipe(mixtures["mixtral"], activation_dtype="int8")
    with pytest.raises(ModelError, match="this base has packed experts, e.g. model.layers.0.mlp.experts"):
        plan_of(base_of(mixtures["mixtral"]), made)
