"""Filling in what a recipe leaves open, once the machine and the data are known."""

from __future__ import annotations

import attrs
import torch

from quantune.model.device import choose_precision
from quantune.recipe.schema import Recipe
from quantune.training.schedule import total_steps, warmup_steps

MICRO_BATCH_TOKENS = 16_384


def resolve(recipe: Recipe, *, device: torch.device, sample_count: int, longest: int) -> Recipe:
    """The recipe with every `auto` and every length of the run decided.

    Args:
        sample_count: training samples.
        longest: tokens of the longest training sample, padding included.
    """
    training = recipe.training
    total = total_steps(training, sample_count)
    micro = training.micro_batch_size
    return attrs.evolve(
        recipe,
        training=attrs.evolve(
            training,
            max_steps=total,
            epochs=None,
            warmup_steps=min(warmup_steps(training, total), total - 1),
            warmup_ratio=None,
            micro_batch_size=_micro_batch_size(training.batch_size, longest) if micro == "auto" else micro,
            precision=choose_precision(training.precision, device),
            device="cuda" if device.type == "cuda" else "cpu",
        ),
        distributed=attrs.evolve(recipe.distributed, threads=torch.get_num_threads()),
    )


def _micro_batch_size(batch_size: int, longest: int) -> int:
    """The largest divisor of the batch size that keeps a micro-batch within MICRO_BATCH_TOKENS."""
    fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n * longest <= MICRO_BATCH_TOKENS]
    return max(fitting, default=1)
