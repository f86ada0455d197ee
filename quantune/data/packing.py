"""Several samples in one row: which go together, and the row they make.

A packed row says where each token stands in its own sample (`Sample.positions`). Where that starts again at 0, another
sample begins; models keep the samples apart by it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import attrs
import numpy as np

from quantune.data.dataset import Dataset
from quantune.data.tokenization import Sample

NAMED = 4
"""Samples of a row that messages name."""


def pack(dataset: Dataset, max_length: int, *, keep_order: bool) -> Dataset:
    """The samples of a dataset in rows of up to `max_length` tokens, each a sample of its own.

    With `keep_order` the rows follow the order of the samples; otherwise they are filled as well as can be. Which
    samples share a row depends on their lengths and order alone.
    """
    lengths = [len(sample.input_ids) for sample in dataset.samples]
    groups = in_order(lengths, max_length) if keep_order else best_fit(lengths, max_length)
    rows = tuple(_row([dataset.samples[index] for index in group]) for group in groups)
    fill = sum(lengths) / (len(rows) * max_length)
    return Dataset(samples=rows, counts=attrs.evolve(dataset.counts, packed_rows=len(rows), fill=fill))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in groups whose lengths sum to at most `capacity`, by best-fit decreasing: the longest first, each into
    the fullest group that still has room for it."""
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            group, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[place]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        groups[group].append(index)
        room -= lengths[index]
        if room not in by_room:
            by_room[room] = []
            bisect.insort(rooms, room)
        by_room[room].append(group)
    return groups


def in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in groups whose lengths sum to at most `capacity`, none moved."""
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = capacity
        groups[-1].append(index)
        room -= length
    return groups


def _row(samples: Sequence[Sample]) -> Sample:
    more = f" and {len(samples) - NAMED} more in its row" if len(samples) > NAMED else ""
    return Sample(
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        is_target=np.concatenate([sample.is_target for sample in samples]),
        where=" + ".join(sample.where for sample in samples[:NAMED]) + more,
        prompt_length=0,
        positions=np.concatenate([np.arange(len(sample.input_ids), dtype=np.int32) for sample in samples]),
    )
