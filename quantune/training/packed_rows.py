"""How the rows of a batch are given to a model so that the samples of a packed row don't see each other.

From positions that start again transformers builds the masks of sdpa, eager and flex attention, row by row; flash
attention takes the borders of the samples from them, in a single row. A few architectures don't hand the positions on
(gpt-oss in transformers 5.24) and are given the masks themselves. What has a memory besides attention (state spaces,
linear attention, convolutions) or masks of its own carries one sample over into the next. Which of these a model is
gets measured, on the loaded model.
"""

from __future__ import annotations

import inspect
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from quantune.data.collate import Batch, collate
from quantune.data.dataset import Counts, Dataset
from quantune.data.packing import pack
from quantune.data.tokenization import Sample
from quantune.errors import ModelError

SIDE_BY_SIDE = ("sdpa", "eager", "flex_attention")
"""The attention implementations whose masks are built for every row of a batch; the others need a single row."""
LENGTHS = (11, 9, 6, 10)
"""Tokens of the samples that are tried, two of them in each row of ROW."""
ROW = 20


@attrs.frozen(kw_only=True)
class RowLayout:
    """How rows become the arguments of a model."""

    one_row: bool = False
    """Lay the packed rows of a batch end to end."""
    masks_of: PretrainedConfig | None = None
    """Give the model of this configuration its masks, and not only the positions to make them from."""
    dtype: torch.dtype = torch.float32
    """Of the masks."""

    def arrange(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """`input_ids` and `labels`, both (batch, length) or (1, batch * length), and the model's other arguments."""
        laid = batch.in_one_row() if self.one_row and batch.position_ids is not None else batch
        arguments: dict[str, Any] = {}
        if laid.position_ids is not None:
            positions = arguments["position_ids"] = laid.position_ids.to(device)
            if self.masks_of is not None:
                like = torch.empty(*positions.shape, 1, dtype=self.dtype, device=device)
                masks = create_masks_for_generate(self.masks_of, like, None, None, position_ids=positions)
                arguments["attention_mask"] = masks
        return laid.input_ids.to(device), laid.labels.to(device), arguments


def layout_for(model: PreTrainedModel, device: torch.device | None = None) -> RowLayout:
    """The layout in which `model`, which computes on `device`, keeps packed samples apart.

    Raises:
        ModelError: there is none: what stands before a sample in its row changes its logits.
    """
    config, dtype = model.config, model.dtype
    one_row = config._attn_implementation not in SIDE_BY_SIDE
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
        raise ModelError(_mixes(model, "it takes no position_ids"))
    where = device or model.device
    training = model.training
    model.eval()
    try:
        by_positions = RowLayout(one_row=one_row)
        problem = _problem(model, by_positions, where)
        if problem is None:
            return by_positions
        by_masks = RowLayout(one_row=one_row, masks_of=config, dtype=dtype)
        if _works(model, by_masks, where):
            return by_masks
    finally:
        model.train(training)
    raise ModelError(_mixes(model, problem))


def _works(model: PreTrainedModel, layout: RowLayout, device: torch.device) -> bool:
    try:
        return _problem(model, layout, device) is None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it makes its masks in another way
        return False


@torch.no_grad()
def _problem(model: PreTrainedModel, layout: RowLayout, device: torch.device) -> str | None:
    """What goes wrong when samples are packed, None when nothing does.

    Rounding is measured beside it: what comes after a sample can't change it, so what changes there is rounding.
    """
    samples, others = _samples(model, seed=0), _samples(model, seed=1)
    packed = _packed_logits(model, layout, samples, device)
    first_replaced = _packed_logits(model, layout, [*_alternate(others, samples)], device)
    second_replaced = _packed_logits(model, layout, [*_alternate(samples, others)], device)
    leak = max(float(_change(first_replaced[i], packed[i]).mean()) for i in (1, 3))
    rounding = max(float(_change(second_replaced[i], packed[i]).max()) for i in (0, 2))
    if not leak <= max(1e-6, 4 * rounding):
        return f"the sample before it changes a sample's logits by {leak:.1g} of their size"

    alone = [_logits(model, torch.from_numpy(one.input_ids).long()[None].to(device), {})[0] for one in samples]
    moved = max(float(_change(packed[i], alone[i]).mean()) for i in (1, 3))
    rounding = max(float(_change(packed[i], alone[i]).max()) for i in (0, 2))
    if not moved <= max(1e-4, 4 * torch.finfo(model.dtype).eps, 4 * rounding):
        return f"a sample's place in its row changes its logits by {moved:.1g} of their size"
    return None


def _samples(model: PreTrainedModel, seed: int) -> list[Sample]:
    """Samples of LENGTHS tokens from the beginning of the vocabulary."""
    vocabulary = min(model.config.get_text_config().vocab_size, 256)
    tokens = np.random.Generator(np.random.Philox(seed)).integers(0, vocabulary, sum(LENGTHS)).astype(np.int32)
    return [
        Sample(input_ids=part, is_target=np.ones(len(part), dtype=bool), where="a probe", prompt_length=0)
        for part in np.split(tokens, np.cumsum(LENGTHS)[:-1])
    ]


def _alternate(first: list[Sample], second: list[Sample]) -> list[Sample]:
    """The first sample of every row from `first`, its second from `second`."""
    return [(first, second)[index % 2][index] for index in range(len(LENGTHS))]


def _packed_logits(
    model: PreTrainedModel, layout: RowLayout, samples: list[Sample], device: torch.device
) -> list[Tensor]:
    """The logits of each sample, computed in packed rows."""
    rows = pack(Dataset(samples=tuple(samples), counts=Counts()), ROW, keep_order=True)
    batch = collate(rows.samples, pad_id=0)
    input_ids, _, arguments = layout.arrange(batch, device)
    logits = _logits(model, input_ids, arguments).view(*batch.input_ids.shape, -1)
    return [
        part for row, lengths in zip(logits, (LENGTHS[:2], LENGTHS[2:]), strict=True) for part in _parts(row, lengths)
    ]


def _parts(row: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return row[: sum(lengths)].split(lengths)


def _logits(model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Shape (batch, length, vocabulary), fp32, on the CPU; less their mean, which no probability depends on."""
    logits = model(input_ids=input_ids, **arguments, use_cache=False).logits.float().cpu()
    return logits - logits.mean(dim=-1, keepdim=True)


def _change(found: Tensor, expected: Tensor) -> Tensor:
    """Shape (length,): by how much of its size each position's logits changed."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def _mixes(model: PreTrainedModel, why: str) -> str:
    return (
        f"[data] packing = true puts several samples into one row, and {type(model).__name__} does not keep them "
        f"apart: {why}. Set packing = false"
    )
