"""What a comparison finds, as data."""

from __future__ import annotations

import math
from typing import Any

import attrs

UNQUANTIZED = "unquantized"
"""The name of the reference row."""


@attrs.frozen(kw_only=True)
class LayerFigures:
    """The weights of one kind of layer, or all of them: what they take and how far they are from the original ones."""

    kind: str
    """The layers' name in their block, e.g. `q_proj` or `experts.down_proj`."""
    layers: int
    """How many there are; a stack of fused experts counts once."""
    weights: int
    nbytes: int
    """What they are stored in, scales and padding included."""
    relative_error: float
    """Frobenius norm of the error over that of the original weights."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio in decibels; None where there is no error."""
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else None


@attrs.frozen(kw_only=True)
class OutputFigures:
    """What the model says about the text."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    kl: float
    """Mean over the tokens of KL(unquantized || this), in nats."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@attrs.frozen(kw_only=True)
class DequantizeFigures:
    """The time of dequantizing every packed weight once, the best of several rounds."""

    ms_per_million: float
    """Milliseconds per million weights."""
    memcpys: float
    """The same as a multiple of copying as many dense weights."""


@attrs.frozen(kw_only=True)
class TrainingFigures:
    """The time of a training step: forward, backward and AdamW over a LoRA adapter on all linear layers."""

    seconds: float
    """The best of the timed steps."""
    tokens_per_second: float


@attrs.frozen(kw_only=True)
class FormatRow:
    """One format on the model; where it can't be measured, `problem` says why and the rest is None."""

    format: str
    """As `--only` takes it, e.g. `bnb:nf4`; `unquantized` for the reference."""
    options: dict[str, Any] = attrs.field(factory=dict)
    """The backend's options."""
    problem: str | None = None
    load_seconds: float | None = None
    model_bytes: int | None = None
    """The whole model, embeddings and head included."""
    weights: LayerFigures | None = None
    """All packed weights; of the reference, the linear layers."""
    kinds: tuple[LayerFigures, ...] = ()
    """The same by kind of layer."""
    outputs: OutputFigures | None = None
    dequantize: DequantizeFigures | None = None
    """None for the reference."""
    training: TrainingFigures | None = None


@attrs.frozen(kw_only=True)
class Setting:
    """What the figures depend on."""

    model: str
    device: str
    precision: str
    torch: str
    threads: int
    text: str
    """The text's name."""
    text_tokens: int
    """How many tokens it has."""
    tokens: int
    """How many were predicted and compared."""
    window: int
    """Most tokens a prediction is made from."""
    batch: tuple[int, int]
    """Rows and tokens a row of the training step."""


@attrs.frozen(kw_only=True)
class Comparison:
    """The reference row, then a row for each format."""

    setting: Setting
    rows: tuple[FormatRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, derived figures included."""
        return {"setting": attrs.asdict(self.setting), "rows": [_row(row) for row in self.rows]}


def _row(row: FormatRow) -> dict[str, Any]:
    document = attrs.asdict(row)
    document["weights"] = None if row.weights is None else _layers(row.weights)
    document["kinds"] = [_layers(kind) for kind in row.kinds]
    if row.outputs is not None:
        document["outputs"]["perplexity"] = row.outputs.perplexity
    return document


def _layers(figures: LayerFigures) -> dict[str, Any]:
    return {**attrs.asdict(figures), "bits_per_weight": figures.bits_per_weight, "snr_db": figures.snr_db}
