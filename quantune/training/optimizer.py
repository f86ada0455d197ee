"""The optimizer over an adapter's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantune.errors import InputError
from quantune.recipe.schema import TrainingConfig

LR_RATIO = "lr_ratio"
"""Key of a parameter group: its learning rate as a multiple of the schedule's."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """torch's AdamW, or one of bitsandbytes', over what is trained, by name.

    `set_learning_rate` sets the learning rate at each step.
    """
    groups = _groups(parameters, config)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    kind = kinds[config.optimizer]
    return kind(groups, lr=config.learning_rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay)


def require_optimizer(config: TrainingConfig, device: torch.device, processes: int = 1) -> None:
    """Require that the optimizer a recipe asks for works on `device`, in so many processes.

    Raises:
        InputError: it pages a GPU's memory, and there is no GPU; or it can't work on shares of parameters.
    """
    if config.optimizer != "adamw" and processes > 1:
        raise InputError(
            f'[training] optimizer = "{config.optimizer}" works on whole parameters, and {processes} processes have '
            'shares of them; use optimizer = "adamw": each process holds its share of the moments'
        )
    if config.optimizer.startswith("paged") and device.type == "cpu":
        raise InputError(
            f'[training] optimizer = "{config.optimizer}" moves its state out of a GPU\'s memory, and this run is on a '
            f'CPU; use optimizer = "{config.optimizer.removeprefix("paged_")}"'
        )


def page_state(optimizer: torch.optim.Optimizer) -> None:
    """Put the moments of a paged optimizer back into pages; bitsandbytes restores them as ordinary tensors."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, entries in optimizer.state.items():
        for key in ("state1", "state2"):
            if key in entries:
                pages = optimizer.get_state_buffer(parameter, dtype=entries[key].dtype)  # type: ignore[attr-defined]  # bitsandbytes' have it
                entries[key] = pages.copy_(entries[key])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, `rate` times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_RATIO, 1.0)


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """One group; with LoRA+ (arXiv:2402.12354) the B matrices in a second one, with a learning rate of their own."""
    if config.loraplus_lr_ratio is None:
        return [{"params": list(parameters.values())}]
    second = {name for name in parameters if "lora_B" in name}
    return [
        {"params": [parameter for name, parameter in parameters.items() if name not in second]},
        {"params": [parameters[name] for name in sorted(second)], LR_RATIO: config.loraplus_lr_ratio},
    ]
