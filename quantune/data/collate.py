"""From samples to tensors."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from quantune.data.tokenization import Sample

IGNORED = -100
"""The label of a token that is no target, as transformers and torch have it."""


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Samples side by side, padded at the right."""

    input_ids: Tensor
    """Shape (batch, length), int64."""
    labels: Tensor
    """Shape (batch, length), int64, aligned with `input_ids`; IGNORED where a token is no target."""
    where: tuple[str, ...]
    """The row each sample came from."""
    target_tokens: int


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad samples at the right, to the longest."""
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids).long()
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.masked_fill(~torch.from_numpy(sample.is_target), IGNORED)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        where=tuple(sample.where for sample in samples),
        target_tokens=sum(int(sample.is_target.sum()) for sample in samples),
    )


def collate_prompts(samples: Sequence[Sample], pad_id: int) -> tuple[Tensor, Tensor]:
    """The samples' prompts padded at the left: input_ids and attention_mask, both (batch, length) int64."""
    length = max(sample.prompt_length for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sample in enumerate(samples):
        prompt = torch.from_numpy(sample.input_ids[: sample.prompt_length]).long()
        input_ids[row, length - len(prompt) :] = prompt
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids, attention_mask
