"""Checkpoints that are already in a backend's format are taken over bit for bit."""

import json
import shutil

import pytest
import torch
from model.conftest import backend, quantize_fp8, rewrite
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import base_of, dequantize_expert, quantization
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config
from transformers import Mxfp4Config as TransformersMxfp4Config

from quantune.backends import registry
from quantune.backends.backend import adopt_weight
from quantune.checkpoint.run_folder import RunFolder
from quantune.cli.recipes import open_recipe
from quantune.errors import ModelError, QuantizationError
from quantune.model import adapter, mini
from quantune.model.adoption import quantization_over, take_quantization
from quantune.model.base import Base
from quantune.model.load import load_model
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear
from quantune.recipe.schema import AdapterConfig
from quantune.training.observer import SilentObserver
from quantune.training.run import train

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)


def opened(folder):
    """The base in a folder as `open_base` gives it, without a tokenizer."""
    found = base_of(folder)
    config = AutoConfig.from_pretrained(folder)
    stored = take_quantization(config)
    values = {name: getattr(found, name) for name in ("name", "source", "revision", "trust_remote_code", "tokenizer")}
    return Base(**values, attn_implementation=None, config=config, stored=stored)


def load(folder, backend, **plan):
    return load_model(opened(folder), quantization(backend=backend, **plan), compute_dtype=torch.float32, device=CPU)


def test_gpt_oss_answers_as_transformers_does_when_it_dequantizes(gpt_oss_mxfp4):
    model = load(gpt_oss_mxfp4, "mxfp4")
    reference = AutoModelForCausalLM.from_pretrained(
        gpt_oss_mxfp4,
        dtype=torch.bfloat16,
        quantization_config=TransformersMxfp4Config(dequantize=True),
        experts_implementation="eager",
    ).float()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_gpt_oss_experts_hold_the_checkpoints_own_bytes(gpt_oss_mxfp4):
    model = load(gpt_oss_mxfp4, "mxfp4")
    tensors = load_file(gpt_oss_mxfp4 / "model.safetensors")
    for name, module in model.named_modules():
        for leaf, weight_format in experts.weight_formats(module).items():
            for index in range(4):
                views = weight_format.layout.views(module.get_parameter(leaf)[index])
                stored = {part: tensors[f"{name}.{leaf}_{part}"][index] for part in ("blocks", "scales")}
                assert torch.equal(views["blocks"], stored["blocks"].flatten(1))
                assert torch.equal(views["scales"], stored["scales"])
    attention = model.model.layers[0].self_attn.q_proj
    assert type(attention) is torch.nn.Linear  # the checkpoint keeps it in full precision


def test_fp8_blocks_are_taken_over_for_linear_layers_and_experts(deepseek_fp8):
    model = load(deepseek_fp8, "fp8")
    tensors = load_file(deepseek_fp8 / "model.safetensors")
    options = registry.options_of("fp8")()

    def dense(name):
        parts = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
        packed = adopt_weight(backend("fp8"), parts, tuple(tensors[name].shape), torch.float32, options)
        return backend("fp8").dequantize(packed, torch.float32)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert any("kv_a_proj_with_mqa" in name for name in linears)  # 128 rows of 320: a ragged block
    for name, module in linears.items():
        assert torch.equal(module.dequantize(), dense(f"{name}.weight"))
    mixture = model.model.layers[1].mlp.experts
    for index in range(4):
        prefix = f"model.layers.1.mlp.experts.{index}"
        both = torch.cat([dense(f"{prefix}.gate_proj.weight"), dense(f"{prefix}.up_proj.weight")])
        assert torch.equal(dequantize_expert(mixture, "gate_up_proj", index, torch.float32), both)
        down = dequantize_expert(mixture, "down_proj", index, torch.float32)
        assert torch.equal(down, dense(f"{prefix}.down_proj.weight"))
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_an_adopted_base_trains(deepseek_fp8):
    model = adapter.attach(load(deepseek_fp8, "fp8"), AdapterConfig(r=4), base_name="b", seed=0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable_parameters(model).values())


def test_layers_the_recipe_skips_are_dequantized(deepseek_fp8):
    packed, partly = load(deepseek_fp8, "fp8"), load(deepseek_fp8, "fp8", skip=["layers.0", "experts"])
    down = partly.model.layers[0].mlp.down_proj
    assert type(down) is torch.nn.Linear
    assert torch.equal(down.weight, packed.model.layers[0].mlp.down_proj.dequantize())
    assert not experts.weight_formats(partly.model.layers[1].mlp.experts)
    with torch.no_grad():
        torch.testing.assert_close(partly(TOKENS).logits, packed(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_what_the_checkpoint_keeps_dense_and_the_recipe_packs_is_packed(deepseek_fp8, tmp_path):
    """A layer of a quantized checkpoint that is in bf16 after all, without being named as such."""
    tensors = load_file(deepseek_fp8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(deepseek_fp8, tmp_path / "mixed")
    tensors[name] = tensors[name].float().bfloat16()
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "mixed", "fp8")
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_scales_of_another_grid_are_refused_by_name(deepseek_fp8, tmp_path):
    tensors = load_file(deepseek_fp8 / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tensors[name] = torch.ones(9, 9)
    shutil.copytree(deepseek_fp8, tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QuantizationError, match=r"layers.0.self_attn.o_proj.weight: expected .* scales .* found \(9, 9\)"
    ):
        load(tmp_path / "damaged", "fp8")


@pytest.mark.parametrize(
    ("stored", "plan", "message"),
    [
        ({"quant_method": "mxfp4"}, {"backend": "bnb"}, r'asks for backend = "bnb"; drop \[quantization\] .* as it is'),
        ({"quant_method": "gptq"}, {"backend": "mxfp4"}, r"asks for .*; choose the unquantized base"),
        (
            {"quant_method": "awq"},
            None,
            "quantune can't train on that: .* formats of bnb, torchao, mxfp4 and fp8; choose",
        ),
    ],
)
def test_a_checkpoint_in_another_format_is_refused_with_the_way_out(stored, plan, message):
    with pytest.raises(ModelError, match=rf'\[model\] base = "some/base" is already quantized .*{message}'):
        quantization_over("some/base", stored, None if plan is None else quantization(**plan))


def test_a_base_that_is_already_quantized_is_taken_over_as_it_is_without_a_table(tmp_path):
    """What is trained is what a table that names the format trains, and the resolved recipe names it."""
    stored = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    base = rewrite(
        mini.PATH, tmp_path / "fp8", lambda name, tensor: quantize_fp8(name, tensor, block_size=(64, 64)), stored
    )
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1", "response": "2"}\n' * 8)
    adapters = {}
    for name, table in (("without", ""), ("with", '[quantization]\nbackend = "fp8"\nblock_size = [64, 64]\n')):
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f'[model]\nbase = {json.dumps(str(base))}\n{table}[adapter]\nr = 4\n[[data.train]]\npath = "train.jsonl"\n'
            f'format = "instruct"\n[training]\nmax_steps = 2\nprecision = "fp32"\n[output]\ndir = "{tmp_path / name}"\n'
        )
        with RunFolder.open(tmp_path / name, "new") as folder:
            train(open_recipe(path), folder, SilentObserver())
        adapters[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        assert 'backend = "fp8"\n' in (tmp_path / name / "recipe.toml").read_text()
    assert adapters["without"] == adapters["with"]


def test_the_quantization_of_a_text_model_within_another_is_found_and_taken_out():
    config = Gemma3Config(text_config={"quantization_config": {"quant_method": "gptq"}})
    assert take_quantization(config) == {"quant_method": "gptq"}
    assert take_quantization(config) is None


def test_a_quantized_checkpoint_is_never_loaded_as_if_it_were_not(deepseek_fp8):
    with pytest.raises(ModelError, match=r"already quantized \(fp8\) and can't be loaded in full precision"):
        load_model(opened(deepseek_fp8), None, compute_dtype=torch.float32, device=CPU)


def test_an_initialization_that_changes_weights_is_refused(deepseek_fp8):
    base = opened(deepseek_fp8)
    split = adapter.build_initialization(load(deepseek_fp8, "fp8"), AdapterConfig(init="pissa"), seed=0)
    with pytest.raises(ModelError, match=r'init = "pissa" changes the weights before they are packed'):
        load_model(base, quantization(backend="fp8"), compute_dtype=torch.float32, device=CPU, initialization=split)


def test_experts_that_were_taken_over_can_be_adapted(gpt_oss_mxfp4, tmp_path):
    names = ("experts.gate_up_proj", "experts.down_proj")
    model = adapter.attach(load(gpt_oss_mxfp4, "mxfp4"), AdapterConfig(target_parameters=names), base_name="b", seed=0)
    for parameter in adapter.trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.02
    adapter.save_adapter(model.eval(), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        gpt_oss_mxfp4,
        dtype=torch.bfloat16,
        quantization_config=TransformersMxfp4Config(dequantize=True),
        experts_implementation="eager",
    ).float()
    plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
