"""A base as it was trained on."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from quantune.model.adapter import build_initialization
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
) -> PreTrainedModel:
    """Load a base packed as a run packed it, though computing in another dtype.

    Args:
        adapter: that of the run, whose initialization may have taken a share out of the weights; None to load the base
            for itself.
        seed: the run's.
        precision: what the run computed in and packed from; `auto` where nobody says.

    Raises:
        ModelError: the weights can't be read.
        BackendError: the backend can't run here.
    """
    return load_model(
        base,
        base.quantization,
        compute_dtype=compute_dtype,
        device=device,
        initialization=None if adapter is None else build_initialization(skeleton(base), adapter, seed=seed),
        pack_dtype=None if precision == "auto" else DTYPES[precision],
    )
