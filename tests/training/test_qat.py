"""Quantization-aware training: what it computes is what packing the merged weights gives."""

import contextlib
import json
import os
import signal

import attrs
import pytest
import torch
from support import FORMATS, Silent, quantization
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from quantune.backends.backend import pack_weight
from quantune.checkpoint.run_folder import RunFolder
from quantune.data.prepare import prepare
from quantune.distributed.sharding import Root
from quantune.errors import InterruptedRun, ModelError
from quantune.merge.merge import write
from quantune.merge.opening import open_merge
from quantune.merge.request import MergeRequest, Setting
from quantune.merge.trained import find_adapter
from quantune.merge.trial import load_merged, load_reference
from quantune.model import adapter, qat
from quantune.model.base import open_base, skeleton
from quantune.model.load import load_model
from quantune.model.trained import load_trained_adapter, load_trained_base
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    QatConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
)
from quantune.training.evaluate import evaluate
from quantune.training.loss import build_loss
from quantune.training.resolve import read_otherwise
from quantune.training.run import train

CPU = torch.device("cpu")
NOWHERE = SourceConfig(path="nowhere.jsonl", format="completion")
TARGETS = ("q_proj", "down_proj")
KINDS = {
    "lora": ({}, {}),
    "lora on the packed base": ({}, {"lora_base": "packed"}),
    "dora": ({"use_dora": True}, {}),
    "dora on the packed base": ({"use_dora": True}, {"lora_base": "packed"}),
    "full": ({"type": "full"}, {}),
}
"""Keys of `[adapter]` and of `[training.qat]`."""


def recipe(format="bnb nf4", *, adapted=None, qat=None, data=NOWHERE, **training):
    return Recipe(
        model=ModelConfig(base="builtin:mini"),
        quantization=quantization(**FORMATS[format]),
        adapter=AdapterConfig(
            **{"targets": TARGETS, **({} if (adapted or {}).get("type") else {"r": 4}), **(adapted or {})}
        ),
        data=DataConfig(train=(data,)),
        training=TrainingConfig(qat=QatConfig(**(qat or {})), precision="fp32", **training),
    )


def plan_of(base, made):
    return qat.plan_rounding(skeleton(base), made.training.qat, made.quantization, made.adapter, base.stored)


def built(made, dtype=torch.float32):
    """The model of a recipe, its adapter moved away from where it begins, and what it rounds with."""
    base = open_base(made.model, made.quantization)
    plan = plan_of(base, made)
    model = load_model(base, plan.stored, compute_dtype=dtype, device=CPU)
    peft = adapter.attach(model, made.adapter, base_name="", seed=0, rounds=True)
    rounding = qat.round_layers(peft, plan, dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.trainable_parameters(peft).items():
            scale = 0.02 if "lora_magnitude" not in name else 0.1
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean().clamp_min(scale) * 0.5)
    return peft, rounding


def rounding_layers(peft, made):
    """(layer, its trained weight before it is rounded, dense and in fp32) of every target."""
    for name, module in peft.named_modules():
        if not name.endswith(TARGETS):
            continue
        if made.adapter.type == "full":
            layer = module.modules_to_save["default"]
            yield layer, layer.weight.detach()
            continue
        base = module.get_base_layer()
        weight = base.dequantize(torch.float32) if isinstance(base, QuantLinear) else base.weight.float()
        if made.adapter.use_dora:
            yield module, module.lora_variant["default"].merge_safe(module, "default", weight)
        else:
            yield module, weight + module.get_delta_weight("default")


def packed_data(weight_format, weight):
    return pack_weight(weight_format.backend, weight, weight_format.layout.options).data


@pytest.mark.parametrize(
    ("kind", "format", "dtype"),
    [
        *(("lora", name, torch.float32) for name in FORMATS),
        *((kind, "bnb nf4", torch.float32) for kind in KINDS if kind != "lora"),
        *((kind, "torchao int4", torch.bfloat16) for kind in KINDS if "dora" not in kind),
    ],
)
@torch.no_grad()
def test_a_layer_computes_with_the_bytes_that_a_packed_merge_writes(kind, format, dtype):
    adapted, config = KINDS[kind]
    made = recipe(format, adapted=adapted, qat=config)
    peft, _ = built(made, dtype)
    checked = 0
    for layer, merged in rounding_layers(peft.train(), made):
        x = torch.randn(5, merged.shape[1], dtype=dtype)
        weight_format = layer.weight_format if made.adapter.type == "full" else layer.rounds_to
        expected = functional.linear(x, weight_format.dequantize(packed_data(weight_format, merged.to(dtype)), dtype))
        assert torch.equal(layer(x), expected)
        assert (expected - functional.linear(x, merged.to(dtype))).abs().max() > 0  # there was something to round
        checked += 1
    assert checked == 2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_straight_through_the_rounding(kind):
    """Against autograd over the whole weight, in which rounding is the identity."""
    adapted, config = KINDS[kind]
    made = recipe("torchao int4", adapted=adapted, qat=config)
    peft, _ = built(made)
    layer, merged = next(rounding_layers(peft.train(), made))
    weight_format = layer.weight_format if made.adapter.type == "full" else layer.rounds_to
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    x = torch.randn(3, 5, merged.shape[1], requires_grad=True)
    grad = torch.randn(3, 5, merged.shape[0])

    layer(x).backward(grad)
    found = {name: parameter.grad.clone() for name, parameter in trained.items()}
    found_x = x.grad.clone()
    for tensor in (x, *trained.values()):
        tensor.grad = None

    if made.adapter.type == "full":
        weight = trained["weight"]
    else:
        base = layer.get_base_layer()
        weight = base.dequantize() if isinstance(base, QuantLinear) else base.weight
        weight = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if made.adapter.use_dora:
            norm = weight.detach().norm(dim=1)
            weight = (trained["lora_magnitude_vector.default.weight"] / norm)[:, None] * weight
    rounded = weight_format.dequantize(packed_data(weight_format, merged), torch.float32)
    functional.linear(x, weight + (rounded - weight).detach()).backward(grad)
    torch.testing.assert_close(found_x, x.grad, rtol=1e-4, atol=1e-5)
    assert len(found) == {"lora": 2, "dora": 3, "full": 1}[kind.split()[0]]
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_inputs_are_rounded_as_torchao_rounds_activations(dtype):
    """Those of the adapted layers and of their packed neighbours."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import Float8Tensor, Int8Tensor

    made = recipe(f"torchao {dtype}", qat={"activation_dtype": dtype})
    peft, _ = built(made)
    kind = Int8Tensor if dtype == "int8" else Float8Tensor
    neighbours = [(one, one.dequantize()) for one in peft.modules() if isinstance(one, QuantLinear)]
    adapted = [
        (layer, layer.rounds_to.dequantize(packed_data(layer.rounds_to, merged), torch.float32))
        for layer, merged in rounding_layers(peft, made)
    ]
    assert (len(neighbours), len(adapted)) == (5 * 4, 2 * 4)
    for layer, weight in neighbours + adapted:
        x = torch.randn(2, 7, weight.shape[1], requires_grad=True)
        rounded = kind.from_hp(x.detach(), granularity=PerRow()).dequantize()
        y = layer.train()(x)
        torch.testing.assert_close(y, functional.linear(rounded, weight), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(y, functional.linear(x, weight), rtol=1e-5, atol=1e-5)
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_training_rounds_from_its_step_on_and_evaluation_always():
    made = recipe()
    peft, rounding = built(made)
    tokens = torch.arange(24)[None]
    always = peft.train()(tokens).logits
    rounding.begun = False
    assert not torch.equal(peft.train()(tokens).logits, always)
    assert torch.equal(peft.eval()(tokens).logits, always)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few texts."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"The number after {n} is {n + 1}."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path), format="completion")


class StopsIn(Silent):
    """Asks a run to stop in a step."""

    def __init__(self, step):
        self.step_to_stop_in = step

    def step(self, metrics):
        if metrics.step == self.step_to_stop_in:
            os.kill(os.getpid(), signal.SIGTERM)


class SilentMerge(Silent):
    """An observer of a merge that takes every warning for a mistake."""

    def warning(self, text):
        raise AssertionError(text)


def run(made, folder, mode="new", observer=None):
    with RunFolder.open(folder, mode) as opened:
        return train(made, opened, observer or Silent(), resume=mode == "resume")


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "format", "activation_dtype"), [("lora", "bnb nf4", None), ("full", "torchao int8", "int8")]
)
def test_a_resumed_run_ends_with_the_same_bytes_and_merges_as_it_was_evaluated(
    kind, format, activation_dtype, data, tmp_path
):
    adapted, _ = KINDS[kind]
    config = {"activation_dtype": activation_dtype}
    made = recipe(
        format,
        adapted=adapted,
        qat={**config, "fake_quant_after_steps": 2},
        data=data,
        max_steps=5,
        batch_size=4,
        learning_rate=1e-3,
        activation_checkpointing=True,
    )
    made = attrs.evolve(made, checkpoint=CheckpointConfig(every_steps=1))
    made = attrs.evolve(made, data=attrs.evolve(made.data, eval=(data,)))
    whole = run(made, tmp_path / "whole")
    with pytest.raises(InterruptedRun):
        run(made, tmp_path / "stopped", observer=StopsIn(1))
    run(made, tmp_path / "stopped", "resume")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    plain = attrs.evolve(made, training=attrs.evolve(made.training, qat=QatConfig(**config, fake_quant_after_steps=4)))
    run(plain, tmp_path / "later")
    assert adapter_bytes(tmp_path / "later") != adapter_bytes(tmp_path / "whole")  # steps 3 and 4 did round

    base = open_base(made.model, made.quantization)
    plan = plan_of(base, made)
    model = load_trained_base(
        base, made.adapter, seed=0, precision="fp32", compute_dtype=torch.float32, device=CPU, rounding=plan
    )
    loaded = load_trained_adapter(model, whole.adapter, precision="fp32", rounding=plan)
    assert held_out_loss(loaded.eval(), base, made) == pytest.approx(whole.evaluations[-1].loss, rel=1e-6)

    tokens = torch.arange(24)[None]
    for onto in ("packed",) if activation_dtype else ("packed", "dequantized"):  # dense layers round no inputs
        request = MergeRequest(
            adapters=(find_adapter(whole.folder),),
            weights=(1.0,),
            setting=Setting.of(made),
            out=tmp_path / onto,
            onto=onto,
            dtype=torch.float32 if onto == "dequantized" else None,
        )
        opened = open_merge(request, CPU, SilentMerge())
        write(opened, request, SilentMerge())
        merged = load_merged(tmp_path / onto, opened, packed=onto == "packed")
        with torch.no_grad():
            torch.testing.assert_close(merged(tokens).logits, loaded(tokens).logits, rtol=1e-4, atol=1e-4)
            reference = load_reference(opened, request).eval()
            assert torch.equal(reference(tokens).logits, loaded(tokens).logits)


def test_a_run_begins_where_the_one_before_ended_with_all_weights_trained(data, tmp_path):
    """Head and embedding among them, which are not rounded and compute in fp32."""
    targets = ("q_proj", "embed_tokens", "lm_head")
    made = recipe(adapted={"type": "full", "targets": targets}, data=data, max_steps=2, batch_size=4)
    made = attrs.evolve(
        made,
        data=attrs.evolve(made.data, eval=(data,)),
        evaluation=EvaluationConfig(at_start=True),
        training=attrs.evolve(made.training, precision="bf16", learning_rate=1e-3),
    )
    first = run(made, tmp_path / "first")
    began, ended = (one.loss for one in (first.evaluations[0], first.evaluations[-1]))
    assert ended < began - 0.1
    second = run(
        attrs.evolve(made, adapter=attrs.evolve(made.adapter, start_from=str(first.adapter))), tmp_path / "second"
    )
    assert second.evaluations[0].loss == ended

    base = open_base(made.model, made.quantization)
    plan = plan_of(base, made)
    model = load_trained_base(
        base, made.adapter, seed=0, precision="bf16", compute_dtype=torch.bfloat16, device=CPU, rounding=plan
    )
    loaded = load_trained_adapter(model, first.adapter, precision="bf16", rounding=plan)
    assert held_out_loss(loaded.eval(), base, made) == ended


@pytest.mark.parametrize(("format", "said"), [("bnb int8", "bitsandbytes"), ("fp8", "on a GPU"), ("bnb nf4", None)])
def test_a_run_says_that_readers_round_what_it_does_not(format, said):
    sentence = read_otherwise(recipe(format))
    assert sentence is None if said is None else said in sentence
    assert read_otherwise(attrs.evolve(recipe(format), training=TrainingConfig())) is None


@pytest.mark.parametrize(
    ("dtype", "hidden", "said"),
    [(torch.float32, 64, "in bf16 only"), (torch.bfloat16, 72, "its shape is 72 x 64"), (torch.bfloat16, 64, None)],
)
def test_rounded_inputs_that_no_reader_takes_are_refused_before_training(dtype, hidden, said):
    config = LlamaConfig(hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    made = recipe("torchao fp8", qat={"activation_dtype": "fp8"})
    refused = (
        contextlib.nullcontext()
        if said is None
        else pytest.raises(ModelError, match=f"{said}.*; leave activation_dtype out")
    )
    with refused:
        assert qat.plan_rounding(model, made.training.qat, made.quantization, made.adapter).layers


def held_out_loss(model, base, made):
    read = prepare(made.data, base.tokenizer, seed=0, vocabulary_size=4096, observer=Silent())
    loss = build_loss(model.get_base_model(), CPU)
    result = evaluate(
        Root(model), loss, read.eval.samples, base.tokenizer, made.evaluation, pad_id=0, device=CPU, step=0
    )
    return result.loss
