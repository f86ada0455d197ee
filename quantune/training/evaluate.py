"""Evaluation: loss per target token, and exact match of greedily generated answers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from quantune.data.chat import end_token_id
from quantune.data.collate import collate, collate_prompts
from quantune.data.tokenization import Sample
from quantune.recipe.schema import EvaluationConfig
from quantune.training.observer import EvaluationResult

SHOWN_EXAMPLES = 3


def evaluate(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    pad_id: int,
    device: torch.device,
    step: int,
    pad_to: int = 0,
) -> EvaluationResult:
    """Evaluate on `samples`, longest batches first, each padded to at least `pad_to` tokens; the model is left in the
    mode it was in."""
    begun = time.perf_counter()
    samples = samples[: config.max_samples]
    by_length = sorted(samples, key=lambda sample: -len(sample.input_ids))
    training = model.training
    model.eval()
    try:
        mean = _mean_loss(loss, by_length, config.batch_size, pad_id, pad_to, device)
        answers = _answers(model, by_length, tokenizer, config, pad_id, device) if config.exact_match else []
    finally:
        model.train(training)
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
) -> list[str]:
    """Continue left-padded prompts, both (batch, length) int64; greedily when `temperature` is 0.

    Returns the text up to the end token, special tokens left out.
    """
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    ends = _end_tokens(model, tokenizer)
    tokens = model.generate(  # type: ignore[operator]  # transformers' and PEFT's models have it
        input_ids=input_ids,
        attention_mask=attention_mask,
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
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    batch_size: int,
    pad_id: int,
    pad_to: int,
    device: torch.device,
) -> float:
    total, targets = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size], pad_id, pad_to)
        total += float(loss(batch.input_ids.to(device), batch.labels.to(device)))
        targets += batch.target_tokens
    return total / targets


def _answers(
    model: nn.Module,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    pad_id: int,
    device: torch.device,
) -> list[tuple[str, str, str]]:
    """(prompt, reference, answer) of every sample that has a reference answer."""
    answerable = [sample for sample in samples if sample.reference is not None]
    answers = []
    for start in range(0, len(answerable), config.batch_size):
        batch = answerable[start : start + config.batch_size]
        input_ids, attention_mask = collate_prompts(batch, pad_id)
        texts = generate(
            model,
            input_ids.to(device),
            attention_mask.to(device),
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            pad_id=pad_id,
        )
        for sample, text in zip(batch, texts, strict=True):
            prompt = str(tokenizer.decode(sample.input_ids[: sample.prompt_length], skip_special_tokens=True))
            assert sample.reference is not None
            answers.append((prompt.strip(), sample.reference.strip(), text.strip()))
    return answers


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's, the chat template's, and those the model's own generation settings
    name."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, end_token_id(tokenizer), *(declared if isinstance(declared, list) else [declared])}
    return sorted(token_id for token_id in ids if isinstance(token_id, int))
