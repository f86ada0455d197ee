"""Tiny models of several architectures, saved as transformers saves them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quantune.backends import registry
from quantune.backends.backend import pack_weight

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def save(model, folder):
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama with an output head of its own."""
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory):
    """A Llama whose head is its embedding."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True))
    return save(model, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A GPT-2, whose linear layers are Conv1D."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2))
    return save(model, tmp_path_factory.mktemp("gpt2"))


def _mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2))


def _qwen3_moe():
    config = Qwen3MoeConfig(
        **SIZES, **HEADS, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    )
    return Qwen3MoeForCausalLM(config)


def _deepseek_v3():
    config = DeepseekV3Config(
        **{**SIZES, **HEADS, "num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return DeepseekV3ForCausalLM(config)


def _gpt_oss():
    config = GptOssConfig(
        **SIZES,
        **HEADS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    return GptOssForCausalLM(config)


MIXTURES = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss}
"""Mixtures of experts: stored one by one or fused (gpt_oss), rows out or transposed, gates beside or interleaved."""


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory):
    """A folder for each kind of mixture of experts, saved as transformers saves it."""
    folders = {}
    for name, make in MIXTURES.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():  # some architectures start experts at zero
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.1)
        folders[name] = save(model, tmp_path_factory.mktemp(name))
    return folders


def backend(name):
    return registry.load_backend(registry.describe(name))


def rewrite(source, folder, change, quantization_config):
    """A copy of a checkpoint with other tensors and a quantization in its config."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors.update(change(name, tensor))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def gpt_oss_mxfp4(mixtures, tmp_path_factory):
    """gpt-oss as it is published: experts in MXFP4 blocks and scales, everything else in bf16."""
    packer, options = backend("mxfp4"), registry.options_of("mxfp4")()

    def change(name, tensor):
        if tensor.dim() != 3:
            return {name: tensor}
        each = [packer.export(pack_weight(packer, expert.T, options)) for expert in tensor]  # rows are out features
        return {f"{name}_{part}": torch.stack([one[part] for one in each]) for part in ("blocks", "scales")}

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]}
    return rewrite(mixtures["gpt_oss"], tmp_path_factory.mktemp("gpt_oss") / "mxfp4", change, config)


def quantize_fp8(name, tensor, **options):
    """The tensors of a weight as DeepSeek's checkpoints hold them."""
    packer, options = backend("fp8"), registry.options_of("fp8")(**options)
    if tensor.dim() != 2 or "proj" not in name:
        return {name: tensor}
    found = packer.export(pack_weight(packer, tensor.float(), options))
    return {name: found["weight"].clone(), f"{name}_scale_inv": found["weight_scale_inv"].clone()}


@pytest.fixture(scope="session")
def deepseek_fp8(tmp_path_factory):
    """DeepSeek-V3 with fp8 blocks; rows and columns of linear layers that are no multiple of 128."""
    config = DeepseekV3Config(
        **{**SIZES, **HEADS, "hidden_size": 320, "num_key_value_heads": 4},
        moe_intermediate_size=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=160,
        kv_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    source = tmp_path_factory.mktemp("deepseek") / "bf16"
    model.save_pretrained(source)
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return rewrite(source, source.parent / "fp8", quantize_fp8, stored)
