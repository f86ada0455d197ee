"""A tiny Llama with 80 features, which some formats can't store, and the built-in model's tokenizer."""

from __future__ import annotations

import attrs
import pytest
import torch
from support import base_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantune.model import mini

SIZES = {"vocab_size": 4096, "hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The base in its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama80")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder)
    return attrs.evolve(base_of(folder), tokenizer=AutoTokenizer.from_pretrained(mini.PATH))
