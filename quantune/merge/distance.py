"""How far apart two models answer.

Shape suffixes: N predicted tokens, V vocabulary.

Logits are compared in double precision: the divergence of two models that differ by roundings alone, 1e-9 nats and
less, is lost in the rounding of single precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from quantune.comparison.outputs import Predictions
from quantune.errors import VerificationError
from quantune.training.loss import CHUNK_BYTES


@attrs.frozen(kw_only=True)
class Distance:
    """How far one model's answers are from another's on the same tokens."""

    kl: float
    """Mean over the tokens of KL(reference || candidate), in nats."""
    max_kl: float
    """The largest of them."""
    max_difference: float
    """The largest absolute difference of two logits."""
    agreement: float
    """The fraction of tokens where both find the same token likeliest."""
    tokens: int
    """How many predictions were compared."""


@torch.no_grad()
def distance(reference: Predictions, candidate: Predictions) -> Distance:
    """Compare what two models predict for the same tokens.

    Raises:
        VerificationError: they have other vocabularies, or a logit is NaN or infinite.
    """
    count = len(reference.states_ND)
    kls, largest, agreeing = [], 0.0, 0
    for _, expected_NV, found_NV in logit_chunks(reference, candidate):
        kls.append(divergence(expected_NV, found_NV))
        largest = max(largest, float(_difference(expected_NV, found_NV).abs().max()))
        agreeing += int((expected_NV.argmax(-1) == found_NV.argmax(-1)).sum())
    kl_N = torch.cat(kls)
    return Distance(
        kl=float(kl_N.mean()),
        max_kl=float(kl_N.max()),
        max_difference=largest,
        agreement=agreeing / count,
        tokens=count,
    )


@torch.no_grad()
def mean_loss(predictions: Predictions, tokens_N: Tensor, counted_N: Tensor) -> float:
    """The mean cross-entropy in nats over the tokens that count; NaN where none does.

    Args:
        tokens_N: the tokens that are predicted, int64.
        counted_N: which of them count, bool.
    """
    states_ND = predictions.states_ND[counted_N.to(predictions.states_ND.device)]
    labels_N = tokens_N[counted_N].to(states_ND.device)
    only = attrs.evolve(predictions, states_ND=states_ND)
    sums = [
        functional.cross_entropy(only.head(states_ND[rows]).double(), labels_N[rows], reduction="sum")
        for rows in _chunks(only)
    ]
    return float(torch.stack(sums).sum()) / len(labels_N) if sums else math.nan


def improvement_kept(base: float, trained: float, merged: float) -> float | None:
    """The fraction of an adapter's improvement of the loss that is left: 1 for all of it, 0 for the base's loss; None
    where the adapter improves nothing."""
    return (base - merged) / (base - trained) if trained < base else None


def logit_chunks(reference: Predictions, candidate: Predictions) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The logits of two models, fp64 (chunk, V) each, in chunks that take as much memory as a loss does.

    Raises:
        VerificationError: they have other vocabularies, or a logit is NaN or infinite.
    """
    for rows in _chunks(reference):
        expected_NV, found_NV = (it.head(it.states_ND[rows]).double() for it in (reference, candidate))
        if expected_NV.shape != found_NV.shape:
            raise VerificationError(
                f"expected logits over a vocabulary of {expected_NV.shape[-1]} tokens, found {found_NV.shape[-1]}: "
                "the merged model is not of the base that the adapter was trained on"
            )
        if not torch.isfinite(_difference(expected_NV, found_NV)).all():
            raise VerificationError("a model's logits are NaN or infinite: they can't be compared")
        yield rows, expected_NV, found_NV


def _chunks(predictions: Predictions) -> Iterator[slice]:
    count = len(predictions.states_ND)
    if count:
        size = max(1, CHUNK_BYTES // (8 * predictions.head(predictions.states_ND[:1]).shape[-1]))
        yield from (slice(start, min(count, start + size)) for start in range(0, count, size))


def divergence(expected_NV: Tensor, found_NV: Tensor) -> Tensor:
    """KL(expected || found) of every token in nats, shape (N,), from logits."""
    log_p_NV, log_q_NV = expected_NV.log_softmax(-1), found_NV.log_softmax(-1)
    terms_NV = torch.where(torch.isneginf(log_p_NV), 0.0, log_p_NV.exp() * (log_p_NV - log_q_NV))
    return terms_NV.sum(-1).clamp_min(0.0)  # rounding may leave it below 0


def _difference(expected_NV: Tensor, found_NV: Tensor) -> Tensor:
    masked = torch.isneginf(expected_NV) & torch.isneginf(found_NV)  # some models mask tokens
    return torch.where(masked, 0.0, expected_NV - found_NV)
