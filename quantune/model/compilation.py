"""Compiling a model's blocks with `torch.compile`, for training steps."""

from __future__ import annotations

import contextlib
import os
import shutil

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quantune.errors import InputError, ModelError

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


def compile_blocks(model: nn.Module, backend: str = "inductor", *, whole: bool = False) -> None:
    """Compile every block of the model in place.

    All blocks of a kind share one graph: their weights are its inputs. A block with experts is compiled around them:
    how many tokens each gets is known only at run time. With `whole` a graph that breaks is an error, and so are more
    kinds of blocks than torch has graphs for; without it those run uncompiled.

    Raises:
        ModelError: the model has no blocks that are known as such.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"[training] compile = true compiles a model's blocks, and {type(model).__name__} has none that "
            "transformers marks as such; set compile = false"
        )
    for block in blocks:
        block.compile(fullgraph=whole, backend=backend)


def suspended(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """A context in which compiled blocks run as they are: evaluation and generation have shapes of their own, and a
    cache whose every state would be another graph."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
