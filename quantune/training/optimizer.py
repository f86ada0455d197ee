"""The optimizer over an adapter's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from quantune.recipe.schema import TrainingConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' AdamW with moments in 8 bit; the learning rate is set at each step."""
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=config.learning_rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
