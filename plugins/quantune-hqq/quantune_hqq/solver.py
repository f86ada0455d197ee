"""Fitting zero points by half-quadratic splitting (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
Learning Models", Mobius Labs, 2023).

A group x of weights, measured in steps of its scale, is stored as codes q = clamp(round(x + z)) and read as q - z. The
zero point z is sought that minimizes ||x - (q - z)||_p for a p below 1: few large errors in place of many small ones.
An auxiliary e splits it into two problems that are solved in turn:

    minimize  ||e||_p^p + beta / 2 ||e - r||^2,   r = x - (q - z) the error

    e = shrink(r) = sign(r) max(0, |r| - |r|^(p - 1) / beta)      errors that stay: the outliers'
    z = mean(q - (x - e))                                         a zero point for all else
    beta = kappa beta

Since q = x + z - r the new zero point is z - mean(r - e): it moves by the part of the error that shrinking takes away.

The paper's own code measures errors in the weights' unit, where beta = 10 shrinks every error of usual weights to
nothing: p has no say, and weights times 1000 are stored otherwise. Here errors are measured in steps: one above a sixth
of a step is an outlier's, whatever the scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BETA = 10.0
KAPPA = 1.01


def taken_by_shrinking(errors: Tensor, beta: float, lp_norm: float) -> Tensor:
    """The errors minus what `shrink` leaves of them; any shape."""
    magnitudes = errors.abs()
    penalties = magnitudes.log().mul_(lp_norm - 1).exp_().div_(beta)  # on a CPU a third of the time of pow
    return torch.fmin(magnitudes, penalties).copysign_(errors)  # fmin: with p = 1 the penalty of 0 is NaN


def errors_of(groups: Tensor, zeros: Tensor, low: int, high: int) -> Tensor:
    """What storing `groups` with `zeros` gets wrong, in steps; the sign is that of code wanted minus code stored."""
    wanted = groups + zeros[:, None]
    return wanted.sub_(wanted.round().clamp_(low, high))


def fit_zeros(
    groups: Tensor,
    zeros: Tensor,
    *,
    low: int,
    high: int,
    iterations: int,
    lp_norm: float,
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """Zero points with a smaller mean absolute error than `zeros`, group by group; none has a larger one.

    Each group keeps the best of its zero points. (The paper's code stops when the error of the whole weight first
    rises: then a group's bytes depend on the groups around it, and many are left before or after their best.)

    Args:
        groups: fp32, shape (groups, group size), in steps of each group's scale.
        zeros: fp32, shape (groups,): where to start.
        low: the lowest code.
        high: the highest code.
        iterations: how many updates.
        lp_norm: the p of the norm, above 0 and at most 1.
        rounded: rounds zero points to what can be stored, so that errors are measured as they will be.
    """
    errors = errors_of(groups, zeros, low, high)
    best, least = zeros, errors.abs().mean(dim=1)
    beta = BETA
    for _ in range(iterations):
        zeros = rounded(zeros - taken_by_shrinking(errors, beta, lp_norm).mean(dim=1))
        errors = errors_of(groups, zeros, low, high)
        found = errors.abs().mean(dim=1)
        best = torch.where(found < least, zeros, best)
        least = torch.minimum(found, least)
        beta *= KAPPA
    return best
