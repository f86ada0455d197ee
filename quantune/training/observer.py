"""What a run tells whoever watches it. The training code reports; it never prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs


@attrs.frozen(kw_only=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    """Steps done, from 1."""
    epoch: float
    loss: float
    """Mean cross-entropy per target token."""
    loss_max: float
    """The same on the rank where it is largest."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    tokens: int
    """Tokens fed, padding left out."""
    tokens_by_rank: tuple[int, ...]
    target_tokens: int
    seconds: float
    tokens_per_second: float
    """Of all ranks."""
    tokens_per_second_by_rank: tuple[float, ...]
    data_share: float
    """The share of the time that the rank which waited longest for data waited, from 0 to 1."""
    communicated_bytes: int
    """Bytes that all ranks together received from each other: gathered weights and reduced gradients."""
    peak_bytes_by_rank: tuple[int, ...]
    """The most memory that each rank has held so far: on CUDA what torch allocated, elsewhere what was resident."""


@attrs.frozen(kw_only=True)
class EvaluationResult:
    """One evaluation."""

    step: int
    loss: float
    """Mean cross-entropy per target token."""
    perplexity: float
    samples: int
    seconds: float
    exact_match: float | None = None
    """Share of prompts whose generated answer equals the reference, from 0 to 1."""
    examples: tuple[tuple[str, str, str], ...] = ()
    """A few (prompt, reference, answer)."""


@attrs.frozen(kw_only=True)
class ModelSummary:
    """What was loaded and what is trained."""

    base: str
    device: str
    processes: int
    """How many processes share the model."""
    precision: str
    rows: Sequence[Any]
    """`quantune.model.load.ModuleRow`s."""
    trainable: int
    """Trained weights."""
    targets: int
    """Linear layers with an adapter."""
    peak_bytes: int
    """Peak memory while loading, above what the process held before."""
    seconds: float


class Observer(Protocol):
    """Receives a run's events."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def warning(self, text: str) -> None:
        """Something the person should know."""

    def data(self, name: str, counts: Any) -> None:
        """What became of the rows of `train` or `eval`: a `quantune.data.dataset.Counts`."""

    def model(self, summary: ModelSummary) -> None:
        """The model is ready."""

    def start(self, step: int, total: int) -> None:
        """Training begins after `step` of `total` steps."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def evaluation(self, result: EvaluationResult) -> None:
        """An evaluation is done."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint is committed."""


class SilentObserver:
    """Ignores everything."""

    def phase(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def data(self, name: str, counts: Any) -> None: ...

    def model(self, summary: ModelSummary) -> None: ...

    def start(self, step: int, total: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, result: EvaluationResult) -> None: ...

    def checkpoint(self, step: int) -> None: ...
