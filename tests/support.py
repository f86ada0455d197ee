"""Helpers that several test modules share."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from quantune.backends import registry
from quantune.checkpoint.state import capture, write_state
from quantune.model.base import Base
from quantune.quantized import experts
from quantune.recipe.schema import QuantizationConfig


class Silent:
    """An observer of a run that looks away."""

    def __getattr__(self, name):
        return lambda *arguments: None


def save_state(folder, *, parameters, optimizer, progress, identity=None):
    """Capture a state and write it, as a process that is alone."""
    progress, identity = dict(progress), identity or {}
    write_state(folder, capture(parameters=parameters, optimizer=optimizer, progress=progress, identity=identity))


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


def quantization(skip=(), backend="bnb", **options) -> QuantizationConfig:
    """`[quantization]` with the options of a backend, resolved as a recipe's are."""
    made = registry.options_of(backend)(**options)
    return QuantizationConfig(
        backend=backend, skip=tuple(skip), options=made.resolved() if hasattr(made, "resolved") else made
    )


def dequantize_expert(module, name, expert, dtype=torch.float32):
    """The weight of one expert, packed or not, as (out features, in features)."""
    data = module.get_parameter(name).detach()[expert]
    weight_format = experts.weight_formats(module).get(name)
    return experts.as_rows(module, data).to(dtype) if weight_format is None else weight_format.dequantize(data, dtype)


FORMATS = {
    "bnb nf4": {"backend": "bnb", "weight_dtype": "nf4"},
    "bnb fp4": {"backend": "bnb", "weight_dtype": "fp4"},
    "bnb int8": {"backend": "bnb", "weight_dtype": "int8"},
    "torchao int4": {"backend": "torchao", "weight_dtype": "int4", "group_size": 32},
    "torchao nf4": {"backend": "torchao", "weight_dtype": "nf4"},
    "torchao nvfp4": {"backend": "torchao", "weight_dtype": "nvfp4"},
    "torchao int8": {"backend": "torchao", "weight_dtype": "int8"},
    "torchao fp8": {"backend": "torchao", "weight_dtype": "fp8"},
    "mxfp4": {"backend": "mxfp4"},
    "fp8": {"backend": "fp8"},
}
"""Every built-in format, as keys of `[quantization]`."""
