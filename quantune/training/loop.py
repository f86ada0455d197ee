"""The training loop: the same for every backend, adapter and precision.

Read top to bottom: a step gathers its samples, counts their targets, accumulates gradients over micro-batches, refuses
anything that is not finite, and updates. Everything that depends on the step (samples, learning rate) is a pure
function of it, so that a resumed run does exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

import attrs
import torch
from torch import nn

from quantune.data.collate import collate
from quantune.data.dataset import Dataset
from quantune.data.order import step_indices
from quantune.data.tokenization import Sample
from quantune.errors import NonFiniteError
from quantune.recipe.schema import EvaluationConfig, Recipe
from quantune.training.loss import Loss
from quantune.training.observer import EvaluationResult, Observer, StepMetrics
from quantune.training.optimizer import set_learning_rate
from quantune.training.packed_rows import RowLayout
from quantune.training.schedule import learning_rate


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """Everything the loop works on."""

    recipe: Recipe
    model: nn.Module
    loss: Loss
    parameters: Mapping[str, nn.Parameter]
    """What is trained, by name."""
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    device: torch.device
    pad_id: int
    total_steps: int
    warmup_steps: int
    micro_batch_size: int
    pad_to: int = 0
    """Tokens that every micro-batch is padded to at least."""
    layout: RowLayout = attrs.field(factory=RowLayout)
    """How packed rows are given to the model."""


@attrs.define(kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens fed so far, padding left out."""
    target_tokens: int = 0
    """Target tokens so far."""


@attrs.frozen(kw_only=True)
class Hooks:
    """What the loop calls between steps."""

    record: Callable[[StepMetrics], None]
    """After every step."""
    evaluate: Callable[[int], EvaluationResult | None]
    """After a step at which an evaluation is due."""
    save: Callable[[Progress], None]
    """After a step at which a checkpoint is due, and after the last one."""


class StopRequest:
    """Remembers a request to stop (SIGTERM, Ctrl-C) until the step in progress is done."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked a second time: stop at once
        self.signal = number

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over SIGTERM and SIGINT while the context is open."""
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def fit(job: Job, progress: Progress, hooks: Hooks, observer: Observer, stop: StopRequest) -> bool:
    """Train from `progress` to the last step; True when it got there, False when it was asked to stop and saved.

    Raises:
        NonFiniteError: a loss or gradient was NaN or infinite; the parameters are those from before that step.
    """
    recipe = job.recipe
    job.model.train()
    observer.start(progress.step, job.total_steps)
    while progress.step < job.total_steps:
        metrics = train_step(job, progress.step)
        progress.step += 1
        progress.tokens += metrics.tokens
        progress.target_tokens += metrics.target_tokens
        hooks.record(metrics)
        observer.step(metrics)
        last = progress.step == job.total_steps
        due = evaluation_due(recipe.evaluation, progress.step, job.total_steps)
        if due and (last or stop.signal is None):  # a run that is to stop makes up for it when it is resumed
            hooks.evaluate(progress.step)
        if last or stop.signal is not None or _due(progress.step, recipe.checkpoint.every_steps):
            hooks.save(progress)
        if stop.signal is not None and not last:
            return False
    return True


def evaluation_due(config: EvaluationConfig, step: int, total: int) -> bool:
    """Whether a run of `total` steps evaluates after step `step`, at 0 before the first one."""
    if step == 0:
        return config.at_start
    return _due(step, config.every_steps) or (step == total and config.at_end)


def train_step(job: Job, step: int) -> StepMetrics:
    """Do optimizer step number `step`, counted from 0."""
    begun = time.perf_counter()
    config = job.recipe.training
    samples = step_samples(job, step)
    micro_batches = [collate(chunk, job.pad_id, job.pad_to) for chunk in _split(samples, job.micro_batch_size)]
    targets = sum(batch.target_tokens for batch in micro_batches)

    total_loss = 0.0
    for batch in micro_batches:
        loss = job.loss(*job.layout.arrange(batch, job.device)) / targets
        loss.backward()
        total_loss += float(loss.detach())
        if not math.isfinite(total_loss):
            raise NonFiniteError(_not_finite("loss", total_loss, step, batch.where))

    norm = float(torch.nn.utils.clip_grad_norm_(job.parameters.values(), config.max_grad_norm))
    if not math.isfinite(norm):
        raise NonFiniteError(_not_finite("gradient norm", norm, step, [sample.where for sample in samples]))
    rate = learning_rate(step, config=config, total=job.total_steps, warmup=job.warmup_steps)
    set_learning_rate(job.optimizer, rate)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)

    return StepMetrics(
        step=step + 1,
        epoch=(step + 1) * config.batch_size / len(job.dataset.samples),
        loss=total_loss,
        grad_norm=norm,
        learning_rate=rate,
        tokens=sum(len(sample.input_ids) for sample in samples),
        target_tokens=targets,
        seconds=time.perf_counter() - begun,
    )


def step_samples(job: Job, step: int) -> list[Sample]:
    """The samples of one optimizer step, longest first so that micro-batches hold little padding."""
    samples = job.dataset.samples
    training = job.recipe.training
    indices = step_indices(step, training.batch_size, len(samples), training.seed, job.recipe.data.shuffle)
    return sorted((samples[index] for index in indices), key=lambda sample: -len(sample.input_ids))


def _split(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _not_finite(what: str, value: float, step: int, where: Sequence[str]) -> str:
    rows = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
    return (
        f"the {what} of step {step + 1} is {value}; nothing was updated with it. The samples were {rows}. "
        "Look at them, or lower [training] learning_rate"
    )
