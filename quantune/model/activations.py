"""Holding less of the forward pass: activations recomputed in the backward pass, or kept in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import PreTrainedModel

from quantune.errors import ModelError


def recompute_blocks(model: PreTrainedModel) -> None:
    """Keep only the inputs of the model's blocks for the backward pass, and recompute the rest from them.

    Raises:
        ModelError: the architecture does not support it.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"[training] activation_checkpointing: {type(model).__name__} does not support it; set it to false"
        ) from error


def offload(model: nn.Module) -> saved_tensors_hooks:
    """A context in which what autograd keeps for the backward pass waits in the CPU's memory.

    With recomputed blocks that is the blocks' inputs, and little beside them. Weights stay where they are.
    """
    cpu = save_on_cpu(pin_memory=torch.cuda.is_available())
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight or not tensor.is_floating_point() else cpu.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else cpu.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def offloading(loss: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """The loss, its forward pass under `offload`."""

    def offloaded(*arguments: Any) -> Tensor:
        with offload(model):
            return loss(*arguments)

    return offloaded
