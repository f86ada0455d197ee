"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from quantune.recipe.schema import TrainingConfig

DEFAULT_EPOCHS = 1.0
DEFAULT_WARMUP_RATIO = 0.03


def total_steps(config: TrainingConfig, sample_count: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, or as many as `epochs` passes take, at least one."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = DEFAULT_EPOCHS if config.epochs is None else config.epochs
    return max(1, math.ceil(epochs * sample_count / config.batch_size))


def warmup_steps(config: TrainingConfig, total: int) -> int:
    """Steps over which the learning rate rises."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    ratio = DEFAULT_WARMUP_RATIO if config.warmup_ratio is None else config.warmup_ratio
    return round(ratio * total)


def learning_rate(step: int, *, config: TrainingConfig, total: int, warmup: int) -> float:
    """The learning rate of step `step`, counted from 0.

    It rises linearly over the warm-up, is at its peak right after it, and falls so that it would be at `min_lr_ratio`
    of the peak in the step after the last.
    """
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * remaining)
