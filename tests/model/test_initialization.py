"""Initializations that split the weight: base and adapter together begin where the base was."""

import pytest
import torch
from peft import PeftModel
from support import FORMATS, base_of, quantization
from transformers import AutoModelForCausalLM

from quantune.backends import registry
from quantune.backends.backend import pack_weight
from quantune.model import adapter
from quantune.model.base import skeleton
from quantune.model.initialization import Initialization
from quantune.model.load import load_model, packed_fingerprint
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig

CPU = torch.device("cpu")
TOKENS = torch.arange(30).view(2, 15)


def adapted(folder, config, plan):
    """The base with a fresh adapter, as a run makes it."""
    base = base_of(folder)
    split = adapter.build_initialization(skeleton(base), config, seed=5)
    model = load_model(base, plan, compute_dtype=torch.float32, device=CPU, initialization=split)
    return adapter.attach(model, config, base_name=str(folder), seed=5, initialization=split)


def effective_weights(model):
    """Base plus update of every adapted layer, by name."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            base = module.get_base_layer()
            weight = base.dequantize() if isinstance(base, QuantLinear) else base.weight
            delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            found[name] = (weight + delta).detach()
    return found


def error(model, folder):
    """Relative error of base plus update against the checkpoint, over all adapted layers."""
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lost = sum((w - original.get_submodule(n).weight).square().sum() for n, w in effective_weights(model).items())
    whole = sum(original.get_submodule(n).weight.square().sum() for n in effective_weights(model))
    return float((lost / whole).sqrt().detach())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_without_quantization_base_and_adapter_together_are_the_base(llama, init, use_rslora):
    model = adapted(llama, AdapterConfig(r=4, init=init, use_rslora=use_rslora), None)
    assert error(model, llama) < 1e-6
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_B["default"].weight.any()


def test_pissa_holds_the_largest_singular_values(llama):
    config = AdapterConfig(r=4, alpha=8, init="pissa")
    layer = adapted(llama, config, None).get_base_model().model.layers[1].self_attn.q_proj
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weight = original.model.layers[1].self_attn.q_proj.weight
    values = torch.linalg.svdvals(weight)
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[:8], values[4:12], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", FORMATS.values(), ids=FORMATS)
def test_loftq_loses_less_than_packing_alone_with_every_format(llama, plan):
    plain = error(adapted(llama, AdapterConfig(r=8), quantization(**plan)), llama)
    once = error(adapted(llama, AdapterConfig(r=8, init="loftq"), quantization(**plan)), llama)
    often = error(adapted(llama, AdapterConfig(r=8, init="loftq", loftq_iterations=4), quantization(**plan)), llama)
    assert once < 0.93 * plain
    assert often < 0.97 * once or plan.get("weight_dtype") in ("int8", "fp8") or plan["backend"] == "fp8"


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_adapter_answers_alike_on_the_base_split_again(llama, tmp_path, init, use_dora):
    config, plan = AdapterConfig(r=4, init=init, use_dora=use_dora), quantization()
    model = adapted(llama, config, plan)
    torch.manual_seed(0)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.02
    adapter.save_adapter(model, tmp_path)
    base = base_of(llama)
    split = adapter.build_initialization(skeleton(base), config, seed=5)
    again = load_model(base, plan, compute_dtype=torch.float32, device=CPU, initialization=split)
    loaded = adapter.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, loaded.eval()(TOKENS).logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_plain_peft_splits_an_ordinary_base_in_the_same_way(llama, tmp_path, init):
    model = adapted(llama, AdapterConfig(r=4, init=init), None)
    torch.manual_seed(0)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.02
    adapter.save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), tmp_path)
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        torch.testing.assert_close(plain.eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_dora_begins_where_the_base_was(llama, init):
    plan = quantization(weight_dtype="int8")
    plain = adapted(llama, AdapterConfig(r=4, init=init), plan).eval()
    dora = adapted(llama, AdapterConfig(r=4, init=init, use_dora=True), plan).eval()
    with torch.no_grad():
        torch.testing.assert_close(dora(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_are_skipped_are_split_too(llama):
    plan = quantization(skip=["layers.0"], weight_dtype="int8")
    model = adapted(llama, AdapterConfig(r=4, init="pissa"), plan)
    first = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(first.get_base_layer()) is torch.nn.Linear and first.lora_B["default"].weight.any()
    assert error(model, llama) < 0.01


def test_large_weights_are_split_by_subspace_iteration_alike_every_time():
    """Above FULL_SVD_UP_TO; the same singular vectors within rounding, and the same bits from the same seed."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(1200, 1030))[0], torch.linalg.qr(torch.randn(1030, 1030))[0]
    values = torch.cat([torch.tensor([50.0, 30.0, 20.0, 10.0]), torch.rand(1026)])
    weight = (left * values) @ right.T

    def factors(seed):
        split = Initialization(method="pissa", r=4, scaling=2.0, iterations=1, seed=seed, names=frozenset(["layer"]))
        split.split("layer", weight, None)
        return split.factors["layer"]

    one, same, other = factors(1), factors(1), factors(2)
    assert torch.equal(one.lora_A, same.lora_A) and torch.equal(one.lora_B, same.lora_B)
    expected = (left[:, :4] * values[:4]) @ right[:, :4].T
    for found in (one, other):
        torch.testing.assert_close(2.0 * found.lora_B @ found.lora_A, expected, rtol=1e-3, atol=1e-3)


def test_a_rank_above_that_of_the_weight_is_filled_up_with_zeros():
    split = Initialization(method="pissa", r=6, scaling=1.0, iterations=1, seed=0, names=frozenset(["layer"]))
    weight = torch.randn(4, 9)
    rest = split.split("layer", weight, None)
    factors = split.factors["layer"]
    assert factors.lora_A.shape == (6, 9) and factors.lora_B.shape == (4, 6)
    torch.testing.assert_close(rest, torch.zeros(4, 9), rtol=0, atol=1e-5)


def test_loftq_works_through_any_backends_pack_and_dequantize():
    backend = registry.describe("mxfp4").load()
    options = registry.options_of("mxfp4")()
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    split = Initialization(method="loftq", r=8, scaling=0.5, iterations=3, seed=0, names=frozenset(["layer"]))

    def round_trip(dense):
        return backend.dequantize(pack_weight(backend, dense, options), torch.float32)

    rest = split.split("layer", weight, round_trip)
    factors = split.factors["layer"]
    together = round_trip(rest) + 0.5 * factors.lora_B @ factors.lora_A
    assert (together - weight).norm() < 0.9 * (round_trip(weight) - weight).norm()


def test_olora_takes_a_rank_above_that_of_the_weight(llama):
    assert error(adapted(llama, AdapterConfig(r=40, init="olora"), None), llama) < 1e-5  # k_proj has 32 rows


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_share_does_not_depend_on_the_number_of_threads(llama, init):
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            model = adapted(llama, AdapterConfig(r=4, init=init), quantization())
            found.append(packed_fingerprint(model))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_layers_trained_in_full_are_not_split(llama):
    config = AdapterConfig(r=4, init="pissa", modules_to_save=("q_proj",))
    model = adapted(llama, config, quantization(skip=["q_proj"]))
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    saved = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(saved.original_module.weight, original.model.layers[0].self_attn.q_proj.weight)
