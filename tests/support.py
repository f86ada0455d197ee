"""Helpers that several test modules share."""

from __future__ import annotations

from transformers import AutoConfig

from quantune.backends.bnb import BnbOptions
from quantune.model.base import Base
from quantune.recipe.schema import QuantizationConfig


def base_of(folder) -> Base:
    """The base in a folder, without a tokenizer."""
    return Base(
        name=str(folder),
        source=str(folder),
        revision=None,
        trust_remote_code=False,
        attn_implementation=None,
        config=AutoConfig.from_pretrained(folder),
        tokenizer=None,
    )


def quantization(skip=(), **options) -> QuantizationConfig:
    """`[quantization]` with the bnb backend."""
    return QuantizationConfig(backend="bnb", skip=tuple(skip), options=BnbOptions(**options).resolved())
