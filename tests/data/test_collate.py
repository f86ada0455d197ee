"""Batches for training and prompts for generation."""

import numpy as np
import torch

from quantune.data.collate import IGNORED, collate, collate_prompts
from quantune.data.tokenization import Sample

SHORT = Sample(
    input_ids=np.array([5, 6, 7], dtype=np.int32),
    is_target=np.array([0, 0, 1], dtype=bool),
    where="a:1",
    prompt_length=2,
)
LONG = Sample(
    input_ids=np.array([5, 6, 6, 8, 9], dtype=np.int32),
    is_target=np.array([0, 0, 0, 1, 1], dtype=bool),
    where="a:2",
    prompt_length=3,
)


def test_batches_are_padded_at_the_right_and_only_targets_have_labels():
    batch = collate([SHORT, LONG], pad_id=7)
    assert batch.input_ids.tolist() == [[5, 6, 7, 7, 7], [5, 6, 6, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    ignored = IGNORED
    assert batch.labels.tolist() == [[ignored, ignored, 7, ignored, ignored], [ignored, ignored, ignored, 8, 9]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64
    assert batch.target_tokens == 3 and batch.where == ("a:1", "a:2")


def test_prompts_are_padded_at_the_left():
    input_ids, attention_mask = collate_prompts([SHORT, LONG], pad_id=0)
    assert input_ids.tolist() == [[0, 5, 6], [5, 6, 6]]
    assert attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64
