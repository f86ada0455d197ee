"""What `quantune quantize` writes is read by the libraries it is for, and answers as quantune's own packed model."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from model.conftest import MIXTURES, save
from safetensors import safe_open
from support import Silent, base_of, quantization
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    TorchAoConfig,
)

from quantune.backends import registry
from quantune.backends.options import default_options
from quantune.errors import BackendError, QuantizationError
from quantune.model.load import load_model
from quantune.quantize.choice import choose
from quantune.quantize.quantize import quantize

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
BF16_STEPS = 0.02
"""Relative difference where the reader multiplies in bf16 (a rounding is 2^-9), over a few layers."""
INT8_STEPS = 0.04
"""Relative difference where the reader rounds activations to int8 (a rounding is 2^-8 of the largest), likewise."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def any_llama(request, tmp_path_factory):
    return saved_llama(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved_llama(tmp_path_factory, torch.float32)


@pytest.fixture(scope="module")
def bf16_llama(tmp_path_factory):
    return saved_llama(tmp_path_factory, torch.bfloat16)


def saved_llama(tmp_path_factory, dtype):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)).to(dtype).save_pretrained(
        folder
    )
    return folder


def pack(source, out, backend, weight_dtype=None, **options):
    """The folder that `quantune quantize` makes of a checkpoint."""
    choice = choose(backend, weight_dtype, **options)
    quantize(base_of(source), choice, out, device=CPU, observer=Silent())
    return out


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def own_logits(source, backend, skip=(), **options):
    """What quantune answers over the same format of the same checkpoint, in fp32."""
    packed = quantization(skip, backend, **options)
    return logits(load_model(base_of(source), packed, compute_dtype=torch.float32, device=CPU))


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "weight_dtype, options",
    [("int8", {"group_size": 32}), ("fp8", {}), ("nvfp4", {})],
    ids=["int8 in groups", "fp8", "nvfp4"],
)
def test_transformers_answers_exactly_as_quantune_over_torchaos_weights(llama, tmp_path, weight_dtype, options):
    settings = [f"{key}={value}" for key, value in options.items()]
    folder = pack(llama, tmp_path / "out", "torchao", weight_dtype, settings=settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__.endswith("Tensor")  # not dequantized
    expected = own_logits(llama, "torchao", weight_dtype=weight_dtype, **options)
    assert torch.equal(logits(model), expected)


def test_transformers_multiplies_torchaos_int8_rows_before_it_scales_them(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pack(llama, tmp_path / "out", "torchao", "int8"))
    assert difference(logits(model), own_logits(llama, "torchao", weight_dtype="int8")) < 1e-5


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("weight_dtype", ["nf4", "fp4"])
def test_bitsandbytes_dequantizes_the_4_bit_weights_that_quantune_packed(llama, tmp_path, weight_dtype, double_quant):
    settings = [f"double_quant={str(double_quant).lower()}"]
    model = AutoModelForCausalLM.from_pretrained(pack(llama, tmp_path / "out", "bnb", weight_dtype, settings=settings))
    chosen = quantization(backend="bnb", weight_dtype=weight_dtype, double_quant=double_quant)
    own = load_model(base_of(llama), chosen, compute_dtype=torch.float32, device=CPU)
    for name, layer in own.named_modules():
        if name.endswith("_proj"):
            weight = model.get_submodule(name).weight
            dequantized = bnb.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(dequantized, layer.dequantize())
    assert difference(logits(model), logits(own)) < BF16_STEPS  # on the CPU its kernel multiplies in bf16


def test_bitsandbytes_reads_the_int8_weights_and_rounds_activations_too(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pack(llama, tmp_path / "out", "bnb", "int8"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert 1e-4 < difference(logits(model), own_logits(llama, "bnb", weight_dtype="int8")) < INT8_STEPS


def test_transformers_dequantizes_fp8_blocks_to_the_same_weights(any_llama, tmp_path):
    folder = pack(any_llama, tmp_path / "out", "fp8")
    config = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert torch.equal(logits(model), own_logits(any_llama, "fp8"))


def test_transformers_dequantizes_the_mxfp4_experts_of_gpt_oss_to_the_same_weights(tmp_path):
    torch.manual_seed(0)
    source = save(MIXTURES["gpt_oss"](), tmp_path / "gpt_oss")
    folder = pack(source, tmp_path / "out", "mxfp4", skip=["self_attn"])
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        experts_implementation="eager",
    )
    found, expected = logits(model), own_logits(source, "mxfp4", skip=["self_attn"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_transformers_dequantizes_experts_that_a_checkpoint_stores_one_by_one(tmp_path):
    torch.manual_seed(0)
    source = save(MIXTURES["qwen3_moe"](), tmp_path / "qwen3_moe")
    folder = pack(source, tmp_path / "out", "fp8", settings=["block_size=[32, 32]"])
    config = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, experts_implementation="eager"
    )
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.gate_proj.weight_scale_inv" in file.keys()  # noqa: SIM118
    expected = own_logits(source, "fp8", block_size=(32, 32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_torchao_loads_int4_bit_for_bit(bf16_llama, tmp_path):
    """Its int4 multiplies on CUDA only, with a package of its own; what it loads can be seen here."""
    folder = pack(bf16_llama, tmp_path / "out", "torchao", "int4", settings=["group_size=32"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    chosen = quantization(backend="torchao", weight_dtype="int4", group_size=32)
    own = load_model(base_of(bf16_llama), chosen, compute_dtype=torch.float32, device=CPU)
    for name, layer in own.named_modules():
        if name.endswith("_proj"):
            weight = model.get_submodule(name).weight
            views = layer.weight_format.layout.views(layer.weight)
            assert all(torch.equal(getattr(weight, part), tensor) for part, tensor in views.items())
            assert (list(weight.shape), weight.block_size) == ([layer.out_features, layer.in_features], [1, 32])


@pytest.mark.parametrize(
    "weight_dtype, activation_dtype", [("int8", "int8"), ("fp8", "fp8")], ids=["int8 by int8", "fp8 by fp8"]
)
def test_torchao_rounds_activations_where_that_is_asked_for(bf16_llama, tmp_path, weight_dtype, activation_dtype):
    plain = pack(bf16_llama, tmp_path / "plain", "torchao", weight_dtype)
    rounding = pack(bf16_llama, tmp_path / "out", "torchao", weight_dtype, activation_dtype=activation_dtype)
    weights_alone, both = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (plain, rounding))
    own = own_logits(bf16_llama, "torchao", weight_dtype=weight_dtype)
    assert difference(weights_alone, own) < BF16_STEPS
    step = {"int8": INT8_STEPS, "fp8": 0.08}[activation_dtype]  # fp8's mantissa has 3 bits: a rounding is 2^-4
    assert 1e-3 < difference(both, weights_alone) < step


def torchao_itself(format):
    """What torchao writes of a weight of 256 x 128 in bf16: header and config."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8Tensor,
        Float8WeightOnlyConfig,
        Int4Tensor,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    config = {
        "int8": Int8WeightOnlyConfig(),
        "int8 in groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int8 by int8": Int8DynamicActivationInt8WeightConfig(),
        "fp8": Float8WeightOnlyConfig(),
        "fp8 by fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        "int4": Int4WeightOnlyConfig(group_size=32),
        "nvfp4": NVFP4WeightOnlyConfig(),
    }[format]
    layer = nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    if format == "fp8 by fp8":  # on a CPU it multiplies so, and does not quantize so
        rounding = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), kernel_preference=config.kernel_preference)
        weight = Float8Tensor.from_hp(layer.weight.data, mm_config=config.mm_config, act_quant_kwargs=rounding)
    elif format == "int4":  # it packs on CUDA only
        scale = torch.zeros(4, 256, dtype=torch.bfloat16)
        codes = torch.zeros(256, 64, dtype=torch.int8)
        weight = Int4Tensor(codes, scale, scale.clone(), [1, 32], layer.weight.shape)
    else:
        quantize_(layer, config)
        weight = layer.weight.data
    _, header = flatten_tensor_state_dict({"0.weight": weight})
    return json.loads(header["0.weight"]), TorchAoConfig(config).to_dict()["quant_type"]["default"]


FORMATS = {
    "int8": ("int8", [], None),
    "int8 in groups": ("int8", ["group_size=32"], None),
    "int8 by int8": ("int8", [], "int8"),
    "fp8": ("fp8", [], None),
    "fp8 by fp8": ("fp8", [], "fp8"),
    "int4": ("int4", ["group_size=32"], None),
    "nvfp4": ("nvfp4", [], None),
}


@pytest.mark.parametrize("format", FORMATS)
def test_headers_and_configs_are_torchaos_own(bf16_llama, tmp_path, format):
    from torchao.core.config import config_from_dict

    weight_dtype, settings, activation_dtype = FORMATS[format]
    out = tmp_path / "out"
    pack(bf16_llama, out, "torchao", weight_dtype, settings=settings, activation_dtype=activation_dtype)
    header, config = torchao_itself(format)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model.layers.0.mlp.up_proj.weight"]) == header
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    assert vars(config_from_dict(stored)) == vars(config_from_dict(config))


@pytest.mark.parametrize(
    "backend, weight_dtype, mixture, said",
    [
        (
            "bnb",
            "nf4",
            "mixtral",
            "linear layers, and this is one of fused experts. Keep them in full precision with --skip experts",
        ),
        (
            "torchao",
            "int8",
            "qwen3_moe",
            "this is one of fused experts. Keep them in full precision with --skip experts",
        ),
        ("fp8", None, "gpt_oss", "stores its experts in one tensor"),
        ("mxfp4", None, "mixtral", "MXFP4 is read for the experts of gpt-oss only. Choose another format"),
    ],
)
def test_weights_that_a_reader_does_not_take_are_named_before_anything_is_written(
    mixture_folders, tmp_path, backend, weight_dtype, mixture, said
):
    with pytest.raises(BackendError, match="does not take") as caught:
        pack(mixture_folders[mixture], tmp_path / "out", backend, weight_dtype)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def mixture_folders(tmp_path_factory):
    return {name: save(MIXTURES[name](), tmp_path_factory.mktemp(name)) for name in ("mixtral", "qwen3_moe", "gpt_oss")}


def test_fp8_blocks_that_transformers_would_misread_are_refused(tmp_path):
    """It takes rows by rows of scales to be the height of the blocks: 96 for 192 rows."""
    config = LlamaConfig(**{**SIZES, "intermediate_size": 192}, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.raises(BackendError, match="its 192 columns don't fill blocks of 128") as caught:
        pack(tmp_path / "in", tmp_path / "out", "fp8")
    assert "--skip down_proj --skip gate_proj --skip up_proj" in str(caught.value)


def test_torchaos_nf4_has_no_reader_and_the_sentence_names_what_has(llama, tmp_path):
    with pytest.raises(BackendError, match="bitsandbytes' nf4 is read by transformers"):
        pack(llama, tmp_path / "out", "torchao", "nf4")


def test_a_backend_of_others_has_no_reader_unless_it_says_so():
    from quantune_hqq import description

    with pytest.raises(QuantizationError, match="no library reads packed checkpoints of the backend 'hqq'; choose bnb"):
        description.load().reader(description.options())


def test_every_activation_dtype_that_is_offered_has_a_reader():
    description, offered = registry.describe("torchao"), []
    for weight_dtype in description.weight_dtypes:
        options = default_options(description, weight_dtype)
        for activation_dtype in options.activation_dtypes():
            reader = description.load().reader(options, activation_dtype)
            assert "Dynamic" in json.dumps(reader.quantization_config((), torch.bfloat16))
            offered.append((weight_dtype, activation_dtype))
    assert offered == [("int8", "int8"), ("fp8", "fp8")]
