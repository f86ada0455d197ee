"""The order of samples: a pure function of (seed, epoch, index), the same on every rank and after every resume."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def step_indices(step: int, batch_size: int, count: int, seed: int, shuffle: bool) -> list[int]:
    """Indices of the samples of optimizer step `step`, counted from 0.

    The stream of samples never ends: epoch follows epoch, and a batch may span two.
    """
    start = step * batch_size
    return [sample_index(position, count, seed, shuffle) for position in range(start, start + batch_size)]


def sample_index(position: int, count: int, seed: int, shuffle: bool) -> int:
    """Index of the sample at `position` of the endless stream over `count` samples."""
    epoch, index = divmod(position, count)
    return int(_permutation(epoch, count, seed)[index]) if shuffle else index


@lru_cache(maxsize=2)
def _permutation(epoch: int, count: int, seed: int) -> np.ndarray:
    """Shape (count,), int64. Philox is counter-based: the stream depends on its key alone, on every platform."""
    key = np.random.SeedSequence((seed, epoch))
    return np.random.Generator(np.random.Philox(key)).permutation(count)
