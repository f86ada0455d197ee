"""What a model with an adapter in it predicts, and what it would predict without."""

from __future__ import annotations

from typing import Any

import attrs
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.comparison.outputs import Predictions, predict
from quantune.comparison.text import Windows


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, with its adapters in it."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def with_adapter(model: nn.Module, windows: Windows) -> Predictions:
    """What the model predicts as it is, for inference."""
    model.eval()
    return predict(inner_model(model), windows)


def without_adapter(model: PeftModel, windows: Windows) -> Predictions:
    """What the base alone predicts; to be used while `model` is there."""
    model.eval()
    with model.disable_adapter():
        without = predict(inner_model(model), windows)

    def head(states: Tensor) -> Tensor:
        with model.disable_adapter():  # the head may be adapted too
            return without.head(states)

    return attrs.evolve(without, head=head)
