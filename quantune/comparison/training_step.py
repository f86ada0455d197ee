"""How fast a model trains: steps of a LoRA adapter on all its linear layers, through what a run uses."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantune.comparison.rows import TrainingFigures
from quantune.comparison.weights import synchronize
from quantune.errors import NonFiniteError
from quantune.model import adapter
from quantune.recipe.schema import AdapterConfig
from quantune.training.loss import build_loss

ADAPTER = AdapterConfig(r=16, targets="all-linear")
ROWS = 4
LENGTH = 128
TIMED_STEPS = 5
LEARNING_RATE = 2e-4
SEED = 0


def make_batch(tokens: Sequence[int], length: int, device: torch.device) -> Tensor:
    """A batch of ROWS x `length` tokens, int64, from the beginning of a text that is repeated where it is short."""
    repeated = [tokens[index % len(tokens)] for index in range(ROWS * length)]
    return torch.tensor(repeated, device=device).view(ROWS, length)


def time_training(model: PreTrainedModel, batch: Tensor, *, base_name: str) -> TrainingFigures:
    """Attach an adapter to `model`, which keeps it, and time steps in which every token is a target.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    peft_model = adapter.attach(model, ADAPTER, base_name=base_name, seed=SEED)
    loss = build_loss(model)
    parameters = list(adapter.trainable_parameters(peft_model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    peft_model.train()

    def step() -> float:
        begun = time.perf_counter()
        value = loss(batch, batch) / batch[:, 1:].numel()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(value.detach()):
            raise NonFiniteError("the loss of a training step is NaN or infinite")
        synchronize(batch.device)
        return time.perf_counter() - begun

    step()  # the first one fills buffers and makes the optimizer's state
    seconds = min(step() for _ in range(TIMED_STEPS))  # other processes only ever make one slower
    return TrainingFigures(seconds=seconds, tokens_per_second=batch.numel() / seconds)
