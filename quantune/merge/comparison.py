"""The ways of merging side by side: what each one's answers lose of what was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from peft import PeftModel
from torch import nn

from quantune.comparison.outputs import Predictions
from quantune.errors import VerificationError
from quantune.merge.answers import with_adapter, without_adapter
from quantune.merge.distance import distance, improvement_kept, mean_loss
from quantune.merge.prompts import Prompts

BASE = "base, no adapter"
TRAINED = "base + adapter"
"""The rows that every comparison begins with: what training began from, and what it came to."""
ENOUGH = 0.9
"""The fraction of the improvement below which a merge is warned of."""


@attrs.frozen(kw_only=True)
class Figures:
    """What a model makes of held-out tokens."""

    loss: float
    """Mean cross-entropy over the target tokens, in nats."""
    kl: float
    """Mean over the same tokens of KL(base + adapter || this), in nats."""


@attrs.frozen(kw_only=True)
class WayRow:
    """One way of merging."""

    way: str
    """`dequantized`, `original`, `packed`, ...; or `BASE` or `TRAINED`."""
    loss: float
    """Mean cross-entropy over the target tokens, in nats."""
    kl: float
    """Mean KL from base + adapter, in nats."""
    kept: float | None
    """The fraction of the adapter's improvement that is left: (loss(base) - loss(this)) / (loss(base) - loss(base +
    adapter)). None where the adapter improves nothing on these tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@attrs.frozen(kw_only=True)
class WaysTable:
    """The comparison of the ways."""

    prompts: str
    """What they were compared on."""
    held_out: bool
    """Whether nothing was trained on that, as far as the recipe says."""
    tokens: int
    """Target tokens."""
    rows: tuple[WayRow, ...]


def rows(base: Figures, trained: Figures, ways: Mapping[str, Figures]) -> tuple[WayRow, ...]:
    """A row for the base, one for base + adapter, and one for each of the `ways`, in their order."""
    return tuple(
        WayRow(way=way, loss=it.loss, kl=it.kl, kept=improvement_kept(base.loss, trained.loss, it.loss))
        for way, it in {BASE: base, TRAINED: trained, **ways}.items()
    )


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """What ways of merging are compared with."""

    predictions: Predictions
    """Those of base + adapter for the target tokens; they keep the output head alone."""
    base: Figures
    trained: Figures


def measure_trained(model: PeftModel, prompts: Prompts) -> Trained:
    """The figures of base + adapter and of the base alone.

    Raises:
        VerificationError: a logit is NaN or infinite, or the prompts have no target token.
    """
    if not prompts.targets_N.any():
        raise VerificationError(f"expected target tokens in {prompts.source}, found none: there is no loss to compare")
    trained = _of_targets(with_adapter(model, prompts.windows), prompts)
    base = _of_targets(without_adapter(model, prompts.windows), prompts)
    return Trained(
        predictions=trained, base=_figures(base, trained, prompts), trained=_figures(trained, trained, prompts)
    )


def measure(model: nn.Module, trained: Trained, prompts: Prompts) -> Figures:
    """The figures of a merged model.

    Raises:
        VerificationError: it has another vocabulary, or a logit is NaN or infinite.
    """
    return _figures(_of_targets(with_adapter(model, prompts.windows), prompts), trained.predictions, prompts)


def _of_targets(predictions: Predictions, prompts: Prompts) -> Predictions:
    states_ND = predictions.states_ND
    return attrs.evolve(predictions, states_ND=states_ND[prompts.targets_N.to(states_ND.device)])


def _figures(found: Predictions, reference: Predictions, prompts: Prompts) -> Figures:
    """The loss of `found` and its distance from `reference`, both for the target tokens alone."""
    tokens_N = prompts.tokens_N[prompts.targets_N]
    everywhere_N = torch.ones(len(tokens_N), dtype=torch.bool)
    return Figures(loss=mean_loss(found, tokens_N, everywhere_N), kl=distance(reference, found).kl)


def table(prompts: Prompts, trained: Trained, ways: Mapping[str, Figures]) -> WaysTable:
    """The rows with what they were measured on."""
    return WaysTable(
        prompts=prompts.source,
        held_out=prompts.held_out,
        tokens=int(prompts.targets_N.sum()),
        rows=rows(trained.base, trained.trained, ways),
    )


def warning(way: str, kept: float | None) -> str | None:
    """What the person should know of a way that loses a good part of what was trained."""
    if kept is None or kept >= ENOUGH:
        return None
    much = "none" if kept <= 0 else f"only {kept:.0%}"
    if way == "dequantized":
        return (
            f"{way} keeps {much} of the adapter's improvement: it is smaller than a rounding of the weights, or was "
            "trained with rounded activations; --dtype fp32 keeps all that weights can hold, and so does serving the "
            "base with the adapter beside it"
        )
    why = "it was trained on other weights" if way == "original" else "the rounding of the weights drowns it"
    aware = "--aware keeps more of it; " if way == "packed" else ""
    return (
        f"{way} keeps {much} of the adapter's improvement: {why}. {aware}--onto dequantized keeps all of it, and so "
        "does serving the packed base with the adapter beside it"
    )
