"""Filling in what a recipe leaves open, once the machine and the data are known."""

from __future__ import annotations

import math
from typing import TypeVar

import attrs
import torch

from quantune.distributed.world import World
from quantune.errors import InputError
from quantune.model.device import choose_precision, has_tf32
from quantune.recipe.schema import CheckpointConfig, EvaluationConfig, Recipe, TrainingConfig
from quantune.training.schedule import total_steps, warmup_steps

MICRO_BATCH_TOKENS = 16_384
ALONE = World()
Periodic = TypeVar("Periodic", EvaluationConfig, CheckpointConfig)


def resolve(recipe: Recipe, *, device: torch.device, sample_count: int, longest: int, world: World = ALONE) -> Recipe:
    """The recipe with every `auto` and every length of the run decided.

    Args:
        sample_count: training samples.
        longest: tokens of the longest training sample, padding included.
        world: the processes that share the work.

    Raises:
        InputError: the warm-up does not end within the run, or no evaluation comes up in it, or rounding
            never begins.
    """
    training = recipe.training
    total = total_steps(training, sample_count)
    if training.warmup_steps and training.warmup_steps >= total:
        raise InputError(
            f"[training] a warm-up of {training.warmup_steps} steps does not end within the run's {total} steps "
            f"({sample_count} samples, {training.batch_size} a step); lower warmup_steps, or raise epochs or max_steps"
        )
    if training.qat is not None and training.qat.fake_quant_after_steps >= total:
        raise InputError(
            f"[training.qat] fake_quant_after_steps = {training.qat.fake_quant_after_steps} never comes within the "
            f"run's {total} steps ({sample_count} samples, {training.batch_size} a step); lower it, or raise epochs or "
            "max_steps"
        )
    evaluation = _every_steps(recipe.evaluation, sample_count / training.batch_size)
    never = evaluation.every_steps is None or evaluation.every_steps > total
    if recipe.data.eval and never and not (evaluation.at_start or evaluation.at_end):
        every = "no every_steps" if evaluation.every_steps is None else f"every_steps = {evaluation.every_steps}"
        if recipe.evaluation.per_epoch is not None:
            every = f"per_epoch = {recipe.evaluation.per_epoch}, which is every {evaluation.every_steps} steps"
        raise InputError(
            f"[[data.eval]] is never evaluated in a run of {total} steps with {every}, at_start = false and "
            f"at_end = false in [evaluation]; set one of them, or remove [[data.eval]]"
        )
    micro, checkpointing = training.micro_batch_size, training.activation_checkpointing
    return attrs.evolve(
        recipe,
        training=attrs.evolve(
            training,
            max_steps=total,
            epochs=None,
            warmup_steps=min(warmup_steps(training, total), total - 1),
            warmup_ratio=None,
            micro_batch_size=_micro_batch_size(training.batch_size, longest, world.size) if micro == "auto" else micro,
            activation_checkpointing=bool(checkpointing) if device.type == "cpu" else checkpointing,
            tf32=training.tf32 and has_tf32(device),
            precision=choose_precision(training.precision, device),
            device="cuda" if device.type == "cuda" else "cpu",
        ),
        evaluation=evaluation,
        checkpoint=_every_steps(recipe.checkpoint, sample_count / training.batch_size),
        distributed=attrs.evolve(recipe.distributed, processes=world.local_size, threads=torch.get_num_threads()),
    )


def without_effect(recipe: Recipe, device: torch.device) -> list[str]:
    """A sentence on each option that a GPU would make use of and `device` does not: one recipe runs on all of them."""
    training = recipe.training
    sentences = []
    if training.tf32 and not has_tf32(device):
        sentences.append("[training] tf32 = true has no effect: this device has no TF32 arithmetic")
    if training.activation_checkpointing == "offload" and device.type == "cpu":
        sentences.append('[training] activation_checkpointing = "offload" is the same as true on a CPU')
    if recipe.distributed.cpu_offload and device.type == "cpu":
        sentences.append("[distributed] cpu_offload = true has no effect: this run is on a CPU")
    return sentences


def read_otherwise(recipe: Recipe) -> str | None:
    """A sentence where readers of the format that a run rounds to do more than it does, None where they don't."""
    if recipe.training.qat is None or recipe.quantization is None:
        return None
    options = recipe.quantization.options
    unasked = options.activations_when_read() if hasattr(options, "activations_when_read") else None
    if unasked is None:
        return None
    return (
        f"[training.qat] leaves activations as they are, and {unasked}: there a packed merge answers a little otherwise"
    )


def _every_steps(config: Periodic, steps_of_an_epoch: float) -> Periodic:
    """The table with `every_steps` in place of `per_epoch`, rounded up so that an epoch never has more of them."""
    if config.per_epoch is None:
        return config
    return attrs.evolve(config, every_steps=max(1, math.ceil(steps_of_an_epoch / config.per_epoch)), per_epoch=None)


def idle_processes(training: TrainingConfig, world: World) -> str | None:
    """A sentence on processes that have nothing to do in any step, None where all have; `training` is resolved."""
    assert isinstance(training.micro_batch_size, int)
    working = math.ceil(training.batch_size / training.micro_batch_size)
    if working >= world.size:
        return None
    return (
        f"a batch of {training.batch_size} samples is {working} micro-batches of {training.micro_batch_size}, so "
        f"{world.size - working} of {world.size} processes have nothing to do: raise [training] batch_size"
        + (", or lower micro_batch_size" if training.micro_batch_size > 1 else "")
    )


def _micro_batch_size(batch_size: int, longest: int, processes: int) -> int:
    """The largest divisor of the batch size that keeps a micro-batch within MICRO_BATCH_TOKENS and gives every process
    as much to do."""
    most = max(1, batch_size // processes)
    fitting = [n for n in range(1, most + 1) if batch_size % n == 0 and n * longest <= MICRO_BATCH_TOKENS]
    return max(fitting, default=1)
