"""A merged model answers as base and adapter did in training."""

import json

import pytest
import torch
from merge.conftest import TOKENS, train
from safetensors.torch import load_file
from support import FORMATS, quantization
from transformers import AutoModelForCausalLM

from quantune.recipe.schema import ModelConfig

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
KINDS = {
    "LoRA": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "DoRA": ("llama", {"use_dora": True}),
    "PiSSA": ("llama", {"init": "pissa"}),
    "OLoRA": ("llama", {"init": "olora"}),
    "LoftQ": ("llama", {"init": "loftq"}),
    "LoftQ and DoRA": ("llama", {"init": "loftq", "use_dora": True}),
    "some layers": ("llama", {"targets": ("q_proj", "down_proj")}),
    "head": ("llama", {"targets": ("all-linear", "lm_head")}),
    "embedding": ("llama", {"targets": ("all-linear", "embed_tokens")}),
    "head and embedding in full": ("llama", {"modules_to_save": ("lm_head", "embed_tokens")}),
    "tied, as it is": ("tied", {}),
    "tied, in full": ("tied", {"modules_to_save": ("embed_tokens",)}),
    "tied, head alone": ("tied", {"targets": ("all-linear", "lm_head")}),
    "tied, embedding alone": ("tied", {"targets": ("all-linear", "embed_tokens")}),
    "experts one by one": ("mixtral", {"target_parameters": EXPERTS}),
    "experts fused, transposed": ("gpt_oss", {"target_parameters": EXPERTS}),
    "experts beside shared ones": ("deepseek_v3", {"targets": ("q_a_proj",), "target_parameters": EXPERTS}),
}


def answers(folder, **options):
    """The logits of a checkpoint in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_answers_as_base_and_adapter(kind, bases, tmp_path):
    base, options = KINDS[kind]
    trained = train(bases[base], tmp_path / "adapter", quantization(weight_dtype="nf4"), **options)
    merged = trained.merge(tmp_path / "merged")
    torch.testing.assert_close(answers(merged), trained.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_merges_exactly(name, bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", quantization(**FORMATS[name]))
    merged = trained.merge(tmp_path / "merged")
    torch.testing.assert_close(answers(merged), trained.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["gpt_oss_mxfp4", "deepseek_fp8"])
def test_checkpoint_that_is_quantized_already_becomes_dense(base, bases, tmp_path):
    trained = train(
        bases[base], tmp_path / "adapter", targets=("o_proj",), target_parameters=("mlp.experts.down_proj",)
    )
    merged = trained.merge(tmp_path / "merged")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    torch.testing.assert_close(answers(merged), trained.logits, rtol=1e-4, atol=1e-4)


def test_unquantized_base(bases, tmp_path):
    trained = train(bases["llama"], tmp_path / "adapter", use_dora=True, init="pissa")
    torch.testing.assert_close(answers(trained.merge(tmp_path / "merged")), trained.logits, rtol=1e-4, atol=1e-4)


def test_biases(tmp_path, bases):
    from merge.conftest import with_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "biased")
    base = with_tokenizer(tmp_path / "biased", tmp_path / "base")
    for bias in ("lora_only", "all"):
        trained = train(base, tmp_path / bias, quantization(weight_dtype="int8"), bias=bias, targets=("q_proj",))
        merged = trained.merge(tmp_path / f"merged {bias}")
        torch.testing.assert_close(answers(merged), trained.logits, rtol=1e-4, atol=1e-4)


def test_vocabulary_that_grew(bases, tmp_path):
    model = ModelConfig(base="builtin:mini", added_tokens=("<one>", "<two>"))
    trained = train(
        "builtin:mini",
        tmp_path / "adapter",
        quantization(weight_dtype="nf4"),
        model=model,
        modules_to_save=("embed_tokens",),
    )
    merged = trained.merge(tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 4098
    torch.testing.assert_close(answers(merged), trained.logits, rtol=1e-4, atol=1e-4)


def test_what_nobody_trained_or_packed_is_the_same_to_the_bit(bases, tmp_path):
    options = quantization(skip=("layers.0",), weight_dtype="nf4")
    trained = train(bases["llama"], tmp_path / "adapter", options, targets=("q_proj",))
    merged = load_file(trained.merge(tmp_path / "merged", dtype=None) / "model.safetensors")
    base = load_file(bases["llama"] / "model.safetensors")
    assert merged.keys() == base.keys()
    other = {name for name in base if not torch.equal(base[name], merged[name])}
    packed = {name for name in base if "layers.1" in name and "proj" in name}
    assert other == packed | {"model.layers.0.self_attn.q_proj.weight"}
