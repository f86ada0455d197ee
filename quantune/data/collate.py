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
    position_ids: Tensor | None = None
    """Shape (batch, length), int64, for packed rows: starts at 0 with every sample, and with the padding, which stands
    apart as if it were one more sample."""

    def in_one_row(self) -> Batch:
        """The rows of a packed batch one after the other, as (1, batch * length)."""
        assert self.position_ids is not None, "only packed rows can stand in one row"
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        return attrs.evolve(self, **{name: getattr(self, name).reshape(1, -1) for name in names})


def collate(samples: Sequence[Sample], pad_id: int, length: int = 0) -> Batch:
    """Pad one or more samples at the right, to the longest or to `length` if that is more."""
    input_ids, attention_mask = _pad([sample.input_ids for sample in samples], pad_id, left=False, length=length)
    is_target, _ = _pad([sample.is_target for sample in samples], 0, left=False, length=length)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=input_ids.masked_fill(is_target == 0, IGNORED),
        where=tuple(sample.where for sample in samples),
        target_tokens=int(is_target.sum()),
        position_ids=_position_ids(samples, input_ids.shape[1]),
    )


def _position_ids(samples: Sequence[Sample], length: int) -> Tensor | None:
    positions = [sample.positions for sample in samples if sample.positions is not None]
    if not positions:
        return None
    rows = [np.concatenate([row, np.arange(length - len(row), dtype=row.dtype)]) for row in positions]
    return torch.from_numpy(np.stack(rows)).long()


def collate_prompts(samples: Sequence[Sample], pad_id: int) -> tuple[Tensor, Tensor]:
    """The prompts of one or more samples, padded at the left as generation needs them.

    Returns:
        `input_ids` and `attention_mask`, both of shape (batch, length), int64.
    """
    return _pad([sample.input_ids[: sample.prompt_length] for sample in samples], pad_id, left=True)


def _pad(rows: Sequence[np.ndarray], fill: int, *, left: bool, length: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of shape (length,) side by side, and where they are: both (batch, longest), int64."""
    longest = max(length, *(len(row) for row in rows))
    values = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(values)
    for index, row in enumerate(rows):
        start = longest - len(row) if left else 0
        values[index, start : start + len(row)] = torch.from_numpy(row)
        mask[index, start : start + len(row)] = 1
    return values, mask
