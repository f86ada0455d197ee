"""Holding out a part of the training samples for the evaluation."""

from __future__ import annotations

import itertools
import math

import attrs
import numpy as np

from quantune.data.dataset import Counts, Dataset, count_samples
from quantune.data.tokenization import Sample
from quantune.errors import DataError

_STREAM = 1
"""Sets the draw apart from the orders of the epochs, which come from the same seed."""


def hold_out(dataset: Dataset, size: int | float, seed: int) -> tuple[Dataset, Dataset]:
    """The training data without what is held out, and what is held out, both in their old order.

    `size` counts samples, or is the fraction of them, rounded up. What is drawn depends on the samples, `size` and
    `seed` alone. The pieces that one text was split into stay together and count once.

    Raises:
        DataError: nothing would be left to train on.
    """
    texts = [list(pieces) for _, pieces in itertools.groupby(dataset.samples, key=lambda sample: sample.row)]
    count = size if isinstance(size, int) else math.ceil(round(size * len(texts), 6))
    if count >= len(texts):
        raise DataError(
            f"[data] eval_size = {size} holds out {count} of the {len(texts)} training samples, and none is left to "
            "train on; lower it, or add [[data.eval]] in its place"
        )
    key = np.random.SeedSequence(seed, spawn_key=(_STREAM,))
    drawn = set(np.random.Generator(np.random.Philox(key)).permutation(len(texts))[:count].tolist())
    kept = [sample for index, pieces in enumerate(texts) if index not in drawn for sample in pieces]
    held = [sample for index, pieces in enumerate(texts) if index in drawn for sample in pieces]
    return (
        _counted(kept, attrs.evolve(dataset.counts, held_out=len(held))),
        _counted(held, Counts(rows=count)),
    )


def _counted(samples: list[Sample], counts: Counts) -> Dataset:
    count_samples(samples, counts)
    return Dataset(samples=tuple(samples), counts=counts)
