"""A base as it was trained on, and what was trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from quantune.model import qat
from quantune.model.adapter import build_initialization, load_adapter
from quantune.model.base import Base, skeleton
from quantune.model.device import DTYPES
from quantune.model.load import load_model
from quantune.model.lora_experts import ParamWrapper
from quantune.recipe.schema import AdapterConfig


def load_trained_base(
    base: Base,
    adapter: AdapterConfig | None,
    *,
    seed: int,
    precision: str,
    compute_dtype: torch.dtype,
    device: torch.device,
    rounding: qat.RoundingPlan | None = None,
) -> PreTrainedModel:
    """Load a base packed as a run packed it, though computing in another dtype.

    Args:
        adapter: that of the run, whose initialization may have taken a share out of the weights; None to load the base
            for itself.
        seed: the run's.
        precision: what the run computed in and packed from; `auto` where nobody says.
        rounding: what the run rounded.

    Raises:
        ModelError: the weights can't be read.
        BackendError: the backend can't run here.
    """
    return load_model(
        base,
        base.quantization if rounding is None else rounding.stored,
        compute_dtype=compute_dtype,
        device=device,
        initialization=None if adapter is None else build_initialization(skeleton(base), adapter, seed=seed),
        pack_dtype=None if precision == "auto" else DTYPES[precision],
    )


def load_trained_adapter(
    model: PreTrainedModel, folder: Path, *, precision: str, rounding: qat.RoundingPlan | None = None
) -> PeftModel:
    """Put a saved adapter on a base that `load_trained_base` loaded with the same arguments, rounding as in the run.

    Raises:
        ModelError: the folder holds no adapter, holds pickles, or does not fit the model.
    """
    dtype = model.dtype if precision == "auto" else DTYPES[precision]
    adapted = load_adapter(model, folder, rounds=rounding is not None)
    hold_dense_in(adapted, dtype)
    if rounding is not None:
        qat.round_layers(adapted, rounding, dtype=dtype)
    return adapted


def hold_dense_in(model: PeftModel, dtype: torch.dtype) -> None:
    """Give the adapted weights that are not packed the values that a run in `dtype` had, whatever they compute in.

    Others keep those of the checkpoint, as they do in a merge.
    """
    for module, leaf in _adapted(model):
        value = module.get_parameter(leaf)
        if value.is_floating_point() and value.dtype != dtype:
            held = value.detach().to(dtype).to(value.dtype)
            module.register_parameter(leaf, nn.Parameter(held, requires_grad=False))  # a tied weight stays as it is


def _adapted(model: PeftModel) -> Iterator[tuple[nn.Module, str]]:
    """What an adapter is added to: modules and names of their parameters, each once."""
    found: dict[tuple[nn.Module, str], None] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            found[module.get_base_layer(), module.parameter_name] = None
        elif isinstance(module, LoraLayer):
            found[module.get_base_layer(), "weight"] = None
            if any(module.lora_bias.values()):
                found[module.get_base_layer(), "bias"] = None
        elif isinstance(module, TrainableTokensWrapper):
            found[module.original_module, "weight"] = None
    return iter(found)
