"""A base as it was trained on, and what was trained on it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from quantune.model import qat
from quantune.model.adapter import build_initialization, load_adapter
from quantune.model.base import Base, skeleton
from quantune.model.device import DTYPES
from quantune.model.load import load_model
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
    if rounding is not None:
        qat.round_layers(adapted, rounding, dtype=dtype)
    return adapted
