"""A small base with a tokenizer, whose sizes divide by nothing but what formats need, and ragged data."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantune.model.base import BUILT_IN

SIZES = dict(hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a base with a head of its own, of one whose head is its embedding, and of one with a single layer."""
    root = tmp_path_factory.mktemp("bases")
    for name, tied, layers in (("untied", False, 2), ("tied", True, 2), ("shallow", False, 1)):
        shutil.copytree(BUILT_IN["builtin:mini"], root / name, ignore=shutil.ignore_patterns("*.safetensors", "*.py"))
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=4099, max_position_embeddings=128, tie_word_embeddings=tied, **SIZES, num_hidden_layers=layers
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Samples of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    made = [{"prompt": f"Count {n} " + "on " * (n * 5 % 17), "response": f"{n}, then {n + 1}."} for n in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
