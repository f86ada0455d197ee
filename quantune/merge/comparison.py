"""The ways of merging side by side: what each one's answers lose of what was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from quantune.comparison.outputs import Predictions, predict
from quantune.errors import VerificationError
from quantune.merge.distance import divergence, logit_chunks
from quantune.merge.prompts import Prompts
from quantune.merge.verify import inner_model, without_adapter

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

    @property
    def drowned(self) -> bool:
        """Whether a good part of what was trained is lost."""
        return self.kept is not None and self.kept < ENOUGH


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
    gain = base.loss - trained.loss
    return tuple(
        WayRow(way=way, loss=it.loss, kl=it.kl, kept=(base.loss - it.loss) / gain if gain > 0 else None)
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
    model.eval()
    trained = _of_targets(predict(inner_model(model), prompts.windows), prompts)
    base = _of_targets(without_adapter(model, prompts), prompts)
    return Trained(
        predictions=trained, base=figures(base, trained, prompts), trained=figures(trained, trained, prompts)
    )


def measure(model: nn.Module, trained: Trained, prompts: Prompts) -> Figures:
    """The figures of a merged model.

    Raises:
        VerificationError: it has another vocabulary, or a logit is NaN or infinite.
    """
    model.eval()
    return figures(_of_targets(predict(inner_model(model), prompts.windows), prompts), trained.predictions, prompts)


def _of_targets(predictions: Predictions, prompts: Prompts) -> Predictions:
    states_ND = predictions.states_ND
    return attrs.evolve(predictions, states_ND=states_ND[prompts.targets_N.to(states_ND.device)])


@torch.no_grad()
def figures(found: Predictions, reference: Predictions, prompts: Prompts) -> Figures:
    """The loss of `found` and its distance from `reference` (base + adapter), both for the target tokens alone.

    Raises:
        VerificationError: they have other vocabularies, or a logit is NaN or infinite.
    """
    tokens = [token for row in prompts.windows.rows for token in row[1:]]
    targets_N = torch.tensor(tokens)[prompts.targets_N].to(found.states_ND.device)
    if not len(targets_N):
        raise VerificationError(f"expected target tokens in {prompts.source}, found none: there is no loss to compare")
    loss, kl = 0.0, 0.0
    for part, expected_NV, found_NV in logit_chunks(reference, found):
        loss += float(functional.cross_entropy(found_NV, targets_N[part], reduction="sum"))
        kl += float(divergence(expected_NV, found_NV).sum())
    return Figures(loss=loss / len(targets_N), kl=kl / len(targets_N))


def table(prompts: Prompts, trained: Trained, ways: Mapping[str, Figures]) -> WaysTable:
    """The rows with what they were measured on."""
    return WaysTable(
        prompts=prompts.source,
        held_out=prompts.held_out,
        tokens=int(prompts.targets_N.sum()),
        rows=rows(trained.base, trained.trained, ways),
    )


def warning(row: WayRow) -> str | None:
    """What the person should know of a way that loses a good part of what was trained."""
    if not row.drowned or row.kept is None:
        return None
    much = "none" if row.kept <= 0 else f"only {row.kept:.0%}"
    return (
        f"{row.way} keeps {much} of the adapter's improvement: the rounding of the weights drowns it. Merge with "
        "--onto dequantized, which keeps all of it, or serve the packed base with the adapter beside it"
    )
