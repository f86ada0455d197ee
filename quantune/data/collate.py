"""From samples to tensors."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
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
    attention_mask: Tensor
    """Shape (batch, length), int64: 1 where there is a token, 0 where there is padding."""
    labels: Tensor
    """Shape (batch, length), int64, aligned with `input_ids`; IGNORED where a token is no target."""
    where: tuple[str, ...]
    """The row each sample came from."""
    target_tokens: int
    """How many labels are targets."""


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad one or more samples at the right, to the longest."""
    input_ids, attention_mask = _pad([sample.input_ids for sample in samples], pad_id, left=False)
    is_target, _ = _pad([sample.is_target for sample in samples], 0, left=False)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=input_ids.masked_fill(is_target == 0, IGNORED),
        where=tuple(sample.where for sample in samples),
        target_tokens=int(is_target.sum()),
    )


def collate_prompts(samples: Sequence[Sample], pad_id: int) -> tuple[Tensor, Tensor]:
    """The prompts of one or more samples, padded at the left as generation needs them.

    Returns:
        `input_ids` and `attention_mask`, both of shape (batch, length), int64.
    """
    return _pad([sample.input_ids[: sample.prompt_length] for sample in samples], pad_id, left=True)


def _pad(rows: Sequence[np.ndarray], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of shape (length,) side by side, and where they are: both (batch, longest), int64."""
    longest = max(len(row) for row in rows)
    values = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(values)
    for index, row in enumerate(rows):
        start = longest - len(row) if left else 0
        values[index, start : start + len(row)] = torch.from_numpy(row)
        mask[index, start : start + len(row)] = 1
    return values, mask
