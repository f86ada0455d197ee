"""Evaluation: loss per target token, and exact match of greedily generated answers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from quantune.data.chat import end_token_id
from quantune.data.collate import collate, collate_prompts
from quantune.data.tokenization import Sample
from quantune.distributed.sharding import Root
from quantune.distributed.world import World
from quantune.recipe.schema import EvaluationConfig
from quantune.training.loss import Loss
from quantune.training.observer import EvaluationResult

SHOWN_EXAMPLES = 3
ALONE = World()


class Stopped(Exception):
    """A rank was asked to stop during an evaluation."""


def evaluate(
    root: Root,
    loss: Loss,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    pad_id: int,
    device: torch.device,
    step: int,
    pad_to: int = 0,
    world: World = ALONE,
    asked: Callable[[], bool] = lambda: False,
) -> EvaluationResult:
    """Evaluate on `samples`, longest batches first, each padded to at least `pad_to` tokens, dealt out to the ranks;
    the model is left in the mode it was in. `asked` says whether this rank was asked to stop.

    Raises:
        Stopped: a rank was, all of them raise it together.
    """
    begun = time.perf_counter()
    samples = samples[: config.max_samples]
    by_length = sorted(samples, key=lambda sample: -len(sample.input_ids))

    def dealt(samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], bool]]:
        """This rank's batches and whether they count: those who have none left take part in the others'."""
        starts = range(0, len(samples), config.batch_size)
        for first in range(0, len(starts), world.size):
            if world.any(asked()):
                raise Stopped
            start = starts[min(first + world.rank, len(starts) - 1)]
            yield samples[start : start + config.batch_size], first + world.rank < len(starts)

    training = root.training
    root.eval()
    try:
        mean = _mean_loss(root, loss, dealt(by_length), pad_id, pad_to, device, world)
        answers = []
        if config.exact_match:
            answerable = [sample for sample in by_length if sample.reference is not None]
            answers = _answers(root, dealt(answerable), tokenizer, config, pad_id, device, world)
    finally:
        root.reshard()
        root.traffic.take()  # what a step reports is its own
        root.train(training)
    matches = [answer == reference for _, reference, answer in answers]
    return EvaluationResult(
        step=step,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        samples=len(samples),
        seconds=time.perf_counter() - begun,
        exact_match=sum(matches) / len(matches) if matches else None,
        examples=tuple(answers[:: max(1, len(answers) // SHOWN_EXAMPLES)][:SHOWN_EXAMPLES]),
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    pad_id: int,
    temperature: float = 0.0,
    together: bool = False,
) -> list[str]:
    """Continue left-padded prompts, both (batch, length) int64; greedily when `temperature` is 0.

    With `together` a rank goes on until all are done: the others gather the model's blocks with it.

    Returns the text up to the end token, special tokens left out.
    """
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    ends = _end_tokens(model, tokenizer)
    tokens = model.generate(  # type: ignore[operator]  # transformers' and PEFT's models have it
        input_ids=input_ids,
        attention_mask=attention_mask,
        synced_gpus=together,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad_id,
            num_beams=1,
            repetition_penalty=1.0,
            **sampling,
        ),
    )
    answers = tokens[:, input_ids.shape[1] :].tolist()
    # an end token is not always a special one, which decoding leaves out
    answers = [list(itertools.takewhile(lambda token_id: token_id not in ends, answer)) for answer in answers]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.no_grad()
def _mean_loss(
    root: Root,
    loss: Loss,
    batches: Iterable[tuple[Sequence[Sample], bool]],
    pad_id: int,
    pad_to: int,
    device: torch.device,
    world: World,
) -> float:
    total, targets = 0.0, 0
    for samples, counts in batches:
        batch = collate(samples, pad_id, pad_to)
        found = float(root(loss, batch.input_ids.to(device), batch.labels.to(device)))
        if counts:
            total += found
            targets += batch.target_tokens
    by_rank = world.gather_numbers([total, targets])
    return sum(total for total, _ in by_rank) / sum(targets for _, targets in by_rank)


def _answers(
    root: Root,
    batches: Iterable[tuple[Sequence[Sample], bool]],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    pad_id: int,
    device: torch.device,
    world: World,
) -> list[tuple[str, str, str]]:
    """(prompt, reference, answer) of every sample, each of which has a reference answer."""
    by_batch = []
    for batch, counts in batches:
        input_ids, attention_mask = collate_prompts(batch, pad_id)
        texts = root(
            generate,
            root.model,
            input_ids.to(device),
            attention_mask.to(device),
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            pad_id=pad_id,
            together=world.size > 1,
        )
        answers = []
        for sample, text in zip(batch, texts, strict=True):
            prompt = str(tokenizer.decode(sample.input_ids[: sample.prompt_length], skip_special_tokens=True))
            assert sample.reference is not None
            answers.append((prompt.strip(), sample.reference.strip(), text.strip()))
        by_batch.append(answers if counts else [])
    by_rank = world.gather(by_batch)
    return [answer for batches in zip(*by_rank, strict=True) for answers in batches for answer in answers]


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's, the chat template's, and those the model's own generation settings
    name."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, end_token_id(tokenizer), *(declared if isinstance(declared, list) else [declared])}
    return sorted(token_id for token_id in ids if isinstance(token_id, int))
