"""Tiny models of several architectures, saved as transformers saves them."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

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


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A mixture of experts, fused by transformers while loading."""
    from transformers import MixtralForCausalLM

    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    return save(MixtralForCausalLM(config), tmp_path_factory.mktemp("mixtral"))
