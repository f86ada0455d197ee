"""The training loop: the same for every backend, adapter and precision.

Read top to bottom: a step gathers its samples, counts their targets, accumulates gradients over micro-batches, refuses
anything that is not finite, and updates. Everything that depends on the step (samples, learning rate) is a pure
function of it, so that a resumed run does exactly what the uninterrupted one would have done. The micro-batches do not
depend on how many ranks there are; they are dealt out to them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import attrs
import numpy as np
import torch
from torch import nn

from quantune.data.collate import Batch, collate
from quantune.data.dataset import Dataset
from quantune.data.order import step_indices
from quantune.data.tokenization import Sample
from quantune.distributed.sharding import Root
from quantune.distributed.shares import gathered
from quantune.distributed.stopping import StopRequest
from quantune.distributed.world import World
from quantune.errors import NonFiniteError
from quantune.quantized.rounding import Rounding
from quantune.recipe.schema import EvaluationConfig, Recipe
from quantune.training.loss import Loss
from quantune.training.memory import peak_memory
from quantune.training.observer import Observer, StepMetrics
from quantune.training.optimizer import set_learning_rate
from quantune.training.packed_rows import RowLayout
from quantune.training.schedule import learning_rate


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """Everything the loop works on."""

    recipe: Recipe
    world: World = attrs.field(factory=World)
    root: Root
    """The model, alone or sharded."""
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
    rounding: Rounding | None = None
    """What the model's layers round with, in quantization-aware training."""


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

    record: Callable[[StepResult], None]
    """After every step."""
    evaluate: Callable[[int], bool]
    """After a step at which an evaluation is due; True when it was asked to stop in it."""
    save: Callable[[Progress], None]
    """After a step at which a checkpoint is due, and after the last one."""
    failed: Callable[[], bool] = lambda: False
    """Whether a checkpoint that is being written has failed."""
    settle: Callable[[], None] = lambda: None
    """Called by every rank when one of them said so; raises the reason."""


def fit(job: Job, progress: Progress, hooks: Hooks, observer: Observer, stop: StopRequest) -> bool:
    """Train from `progress` to the last step; True when it got there, False when it was asked to stop and saved.

    Raises:
        NonFiniteError: a loss or gradient was NaN or infinite; the parameters are those from before that step.
    """
    recipe = job.recipe
    job.root.train()
    observer.start(progress.step, job.total_steps)
    while progress.step < job.total_steps:
        done = train_step(job, progress.step, asked=stop.asked, failed=hooks.failed())
        if done.save_failed:
            hooks.settle()
        progress.step += 1
        progress.tokens += done.metrics.tokens
        progress.target_tokens += done.metrics.target_tokens
        hooks.record(done)
        observer.step(done.metrics)
        last = progress.step == job.total_steps
        # a run that is to stop before its last step makes up for an evaluation when it is resumed
        due = evaluation_due(recipe.evaluation, progress.step, job.total_steps) and (last or not done.stop)
        stopped = due and hooks.evaluate(progress.step)
        if last or stopped or done.stop or _due(progress.step, recipe.checkpoint.every_steps):
            hooks.save(progress)
        if stopped or (done.stop and not last):
            return False
    return True


def evaluation_due(config: EvaluationConfig, step: int, total: int) -> bool:
    """Whether a run of `total` steps evaluates after step `step`, at 0 before the first one."""
    if step == 0:
        return config.at_start
    return _due(step, config.every_steps) or (step == total and config.at_end)


@attrs.frozen(kw_only=True)
class StepResult:
    """A step, and what the ranks agreed on at its end."""

    metrics: StepMetrics
    indices: Sequence[int]
    """The samples of the step, over all ranks, in the order of the data."""
    samples: Sequence[Sample]
    """The same, in the order they were dealt out."""
    stop: bool
    """A rank was asked to stop."""
    save_failed: bool
    """A checkpoint that was being written has failed."""


def train_step(job: Job, step: int, *, asked: bool = False, failed: bool = False) -> StepResult:
    """Do optimizer step number `step`, counted from 0, of which this rank does its share.

    Args:
        asked: this rank was asked to stop.
        failed: a checkpoint that this rank was writing has failed.
    """
    begun = time.perf_counter()
    config = job.recipe.training
    if job.rounding is not None and config.qat is not None:
        job.rounding.begun = step >= config.qat.fake_quant_after_steps
    indices = drawn(job, step)
    samples = step_samples(job, indices)
    targets = sum(int(sample.is_target.sum()) for sample in samples)
    micro_batches = _split(samples, job.micro_batch_size)
    rounds = math.ceil(len(micro_batches) / job.world.size)
    batches = [collate(chunk, job.pad_id, job.pad_to) for chunk in micro_batches[job.world.rank :: job.world.size]]
    collated = time.perf_counter()

    summed, bad = 0.0, -1
    # one that has nothing to do in a round takes part in it: the others gather the blocks with it
    for index, batch in enumerate(batches + [nothing(samples, job)] * (rounds - len(batches))):
        loss = job.root(job.loss, *job.layout.arrange(batch, job.device)) / targets
        loss.backward()
        summed += float(loss.detach())
        if bad < 0 and not math.isfinite(summed):
            bad = min(index * job.world.size + job.world.rank, len(micro_batches) - 1)

    own_targets = sum(batch.target_tokens for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    traffic = job.root.traffic.take()
    mine = (summed, own_targets, tokens, bad, collated - begun, traffic, peak_memory(job.device), asked, failed)
    by_rank = [Share(*row) for row in job.world.gather_numbers(mine)]
    total_loss = sum(share.loss for share in by_rank)
    for rank, share in enumerate(by_rank):
        if share.bad >= 0:
            where = [sample.where for sample in micro_batches[int(share.bad)]]
            raise NonFiniteError(_not_finite("loss", share.loss, step, where, rank if job.world.size > 1 else None))
    norm = clip(job.parameters.values(), config.max_grad_norm)
    if not math.isfinite(norm):
        raise NonFiniteError(_not_finite("gradient norm", norm, step, [sample.where for sample in samples]))
    rate = learning_rate(step, config=config, total=job.total_steps, warmup=job.warmup_steps)
    set_learning_rate(job.optimizer, rate)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - begun
    metrics = StepMetrics(
        step=step + 1,
        epoch=(step + 1) * config.batch_size / len(job.dataset.samples),
        loss=total_loss,
        loss_max=max(share.loss * targets / share.targets for share in by_rank if share.targets),
        grad_norm=norm,
        learning_rate=rate,
        tokens=sum(int(share.tokens) for share in by_rank),
        tokens_by_rank=tuple(int(share.tokens) for share in by_rank),
        target_tokens=targets,
        seconds=seconds,
        tokens_per_second=sum(share.tokens for share in by_rank) / seconds,
        tokens_per_second_by_rank=tuple(share.tokens / seconds for share in by_rank),
        data_share=max(share.data_seconds for share in by_rank) / seconds,
        communicated_bytes=sum(int(share.communicated) for share in by_rank),
        peak_bytes_by_rank=tuple(int(share.peak) for share in by_rank),
    )
    asked_anywhere, failed_anywhere = (
        any(flags) for flags in zip(*((s.asked, s.failed) for s in by_rank), strict=True)
    )
    return StepResult(
        metrics=metrics, indices=indices, samples=samples, stop=asked_anywhere, save_failed=failed_anywhere
    )


class Share(NamedTuple):
    """What a rank tells the others of its share of a step."""

    loss: float
    """Its part of the loss."""
    targets: float
    """Its target tokens."""
    tokens: float
    bad: float
    """Index of the first micro-batch after which its loss was not finite; -1 for none."""
    data_seconds: float
    """Making batches."""
    communicated: float
    """Bytes received."""
    peak: float
    """Most memory held so far, in bytes."""
    asked: float
    """1 if it was asked to stop."""
    failed: float
    """1 if a checkpoint that it was writing has failed."""


def nothing(samples: Sequence[Sample], job: Job) -> Batch:
    """A batch without a target, as small as can be."""
    sample = attrs.evolve(samples[-1], is_target=np.zeros_like(samples[-1].is_target))
    return collate([sample], job.pad_id, job.pad_to)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale the gradients down to a norm of `most` if it is larger, and return it from before."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = gathered(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(trained, most, norm)
    return float(norm)


def drawn(job: Job, step: int) -> list[int]:
    """The indices of the samples of one optimizer step."""
    training = job.recipe.training
    count = len(job.dataset.samples)
    return step_indices(step, training.batch_size, count, training.seed, job.recipe.data.shuffle)


def step_samples(job: Job, indices: Sequence[int]) -> list[Sample]:
    """The samples of one optimizer step, longest first so that micro-batches hold little padding."""
    samples = job.dataset.samples
    return sorted((samples[index] for index in indices), key=lambda sample: -len(sample.input_ids))


def _split(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _not_finite(what: str, value: float, step: int, where: Sequence[str], rank: int | None = None) -> str:
    of = "" if rank is None else f" on rank {rank}"
    rows = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
    return (
        f"the {what} of step {step + 1} is {value}{of}; nothing was updated with it. The samples were {rows}. "
        "Look at them, or lower [training] learning_rate"
    )
