"""Compiling a model's blocks with `torch.compile`, for training steps."""

from __future__ import annotations

import contextlib
import os
import shutil

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quantune.errors import InputError
from quantune.quantized.experts import is_experts

COMPILERS = ("g++", "clang++", "c++")


def require_compiler(device: torch.device) -> None:
    """Require what `torch.compile` needs on `device`.

    Raises:
        InputError: it generates C++ for a CPU, and there is no C++ compiler.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), *COMPILERS)):
        raise InputError(
            "[training] compile = true needs a C++ compiler on a CPU, found none of "
            f"{', '.join(COMPILERS)}; install one, or set compile = false"
        )


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile every block of the model in place and return how many there are.

    All blocks of a kind share one graph: their weights are its inputs. Without experts that graph is whole; how many
    tokens each expert gets is known only at run time, so a block with experts is compiled around them.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        whole = not any(is_experts(part) for part in block.modules())
        block.compile(fullgraph=whole, backend=backend)
    return len(blocks)


def suspended(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """A context in which compiled blocks run as they are: evaluation and generation have shapes of their own, and a
    cache whose every state would be another graph."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
