"""A base as it was trained on, with its adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from quantune.model.adapter import build_initialization, load_adapter
from quantune.model.base import Base, skeleton
from quantune.model.device import DTYPES
from quantune.model.load import load_model
from quantune.recipe.schema import Recipe


def load_trained_base(
    recipe: Recipe, base: Base, *, adapted: bool, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the base packed as the run of `recipe` packed it, though computing in another dtype.

    `adapted` says whether an adapter follows: then what its initialization took out of the weights is left out.

    Raises:
        ModelError: the weights can't be read.
        BackendError: the backend can't run here.
    """
    split = build_initialization(skeleton(base), recipe.adapter, seed=recipe.training.seed) if adapted else None
    trained_in = recipe.training.precision
    return load_model(
        base,
        base.quantization,
        compute_dtype=compute_dtype,
        device=device,
        initialization=split,
        pack_dtype=None if trained_in == "auto" else DTYPES[trained_in],
    )


def load_trained(
    recipe: Recipe, base: Base, adapter: Path, *, compute_dtype: torch.dtype, device: torch.device
) -> PeftModel:
    """The base as above, with the adapter in the folder `adapter`, for inference.

    Raises:
        ModelError: the base or the adapter can't be used, or they do not fit.
        BackendError: the backend can't run here.
    """
    model = load_trained_base(recipe, base, adapted=True, compute_dtype=compute_dtype, device=device)
    return load_adapter(model, adapter)
