"""Random Llama models of a chosen size, for measuring time and memory; their weights mean nothing."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from quantune.model.base import Base

SIZES = {
    "30M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
VOCABULARY = 16_384


def make_model(size: str, folder: Path) -> Path:
    """Save a random bf16 model in `folder / size`, once."""
    path = folder / size
    if not (path / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES[size])
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def base_of(folder: Path) -> Base:
    """The base in a folder, without a tokenizer: nothing is tokenized in a benchmark."""
    return Base(
        name=folder.name,
        source=str(folder),
        revision=None,
        trust_remote_code=False,
        attn_implementation=None,
        config=AutoConfig.from_pretrained(folder),
        tokenizer=attrs.NOTHING,
    )
