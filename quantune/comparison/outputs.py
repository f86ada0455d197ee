"""What a model predicts for a text, and how far that is from what the unquantized model predicts.

Shape suffixes: L tokens of a row, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from quantune.comparison.rows import OutputFigures
from quantune.comparison.text import Windows
from quantune.errors import QuantizationError
from quantune.training.loss import CHUNK_BYTES, LanguageModelLoss, build_loss


@attrs.frozen(kw_only=True, eq=False)
class Predictions:
    """What a model predicts, kept as the hidden states before the output head: logits of a large vocabulary would not
    fit. (Of architectures whose head can't be taken apart it is the logits.)"""

    states_ND: Tensor
    head: Callable[[Tensor], Tensor]
    """From states to logits."""

    def log_probabilities(self, rows: slice) -> Tensor:
        """Those of the tokens in `rows`, shape (rows, V), fp32."""
        return self.head(self.states_ND[rows]).float().log_softmax(dim=-1)


@torch.no_grad()
def predict(model: PreTrainedModel, windows: Windows) -> Predictions:
    """What `model` predicts for every token of every window but its first."""
    loss = build_loss(model)
    states = []
    for row in windows.rows:
        input_ids = torch.tensor([row], device=model.device)
        if isinstance(loss, LanguageModelLoss):
            output = loss.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            output = model(input_ids=input_ids, use_cache=False).logits
        states.append(output[0, :-1])
    return Predictions(states_ND=torch.cat(states), head=_head(loss) if isinstance(loss, LanguageModelLoss) else _same)


def targets(windows: Windows, device: torch.device) -> Tensor:
    """The tokens that are predicted, shape (N,), int64."""
    return torch.tensor([token for row in windows.rows for token in row[1:]], device=device)


@torch.no_grad()
def output_figures(found: Predictions, reference: Predictions, targets_N: Tensor) -> OutputFigures:
    """The mean cross-entropy of `found` and its mean KL divergence from `reference`, in chunks of tokens.

    Raises:
        QuantizationError: the model's outputs are not finite.
    """
    vocabulary = found.head(found.states_ND[:1]).shape[-1]
    loss, kl = 0.0, 0.0
    for rows in _chunks(len(targets_N), vocabulary):
        log_q = found.log_probabilities(rows)
        log_p = reference.log_probabilities(rows)
        loss += float(functional.nll_loss(log_q, targets_N[rows], reduction="sum"))
        p = log_p.exp()
        terms = torch.where(p > 0, log_p.sub_(log_q).mul_(p), 0.0)  # some models mask tokens with -inf
        kl += float(terms.sum(dim=-1).double().sum())
    if not (math.isfinite(loss) and math.isfinite(kl)):
        raise QuantizationError("the model's outputs are NaN or infinite")
    return OutputFigures(loss=loss / len(targets_N), kl=max(0.0, kl / len(targets_N)))  # rounding may leave it below 0


def _head(loss: LanguageModelLoss) -> Callable[[Tensor], Tensor]:
    """The output head alone, so that keeping it does not keep the backbone."""
    head, finish = loss.head, loss.finish
    return head if finish is None else lambda states: finish(head(states))


def _same(logits: Tensor) -> Tensor:
    return logits


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return (slice(start, min(tokens, start + size)) for start in range(0, tokens, size))
