"""Tiny models of several architectures, saved as transformers saves them."""

from __future__ import annotations

import pytest
import torch
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
