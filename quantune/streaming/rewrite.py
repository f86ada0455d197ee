"""Writing a checkpoint like another, file by file and tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quantune.checkpoint.commit import sync
from quantune.streaming.mapping import Unit
from quantune.streaming.output import Output, disk_errors, require_shard_size, require_space
from quantune.streaming.source import Source
from quantune.streaming.writer import ShardWriter, data_bytes, write_index

SMALL_FILES = 2**20
"""Bytes of disk for configuration and the like."""


@attrs.frozen(kw_only=True)
class Entry:
    """One tensor that is to be written."""

    name: str
    nbytes: int
    """Its size, or for what is only known later a little more."""
    beside: str
    """The tensor of the checkpoint that is read whose file it goes into a file like."""


class Job(Protocol):
    """What is written for each unit of a checkpoint."""

    @property
    def notes(self) -> dict[str, str]:
        """What is found out while writing, and must not be lost when another process goes on."""

    def entries(self, unit: Unit) -> Sequence[Entry]:
        """The tensors that `tensors` gives, before there are any."""

    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        """What is written for a unit, by name."""

    def metadata(self, names: Iterable[str]) -> Mapping[str, str]:
        """The metadata of a file that holds `names`."""


class Observer(Protocol):
    """Is told how it goes on."""

    def begin(self, nbytes: int) -> None:
        """So many bytes will be written."""

    def wrote(self, nbytes: int) -> None:
        """So many more are written."""


def rewrite(
    source: Source,
    units: Sequence[Unit],
    job: Job,
    output: Output,
    observer: Observer,
    *,
    beside: int = 0,
    max_shard_size: str | None = None,
) -> int:
    """Write what `job` makes of `units`; returns the size of all tensors.

    Files are like those of `source`, or with `max_shard_size` (e.g. "5GB") none is larger, but for a single tensor.
    Files that `output` has already are let be. `beside` are bytes that other files will take.

    Raises:
        InputError: the disk has too little room, or `max_shard_size` is no size.
        CheckpointError: a file can't be written.
    """
    entries = _entries(source, units, job)
    files = _files(source, [entry for made in entries.values() for entry in made], max_shard_size)
    sizes = {entry.name: entry.nbytes for made in entries.values() for entry in made}
    total = sum(sizes.values())
    require_space(output.target, total + beside + SMALL_FILES)
    job.notes.update(output.notes)
    observer.begin(total)
    for file, names in files.items():
        if file in output.complete:
            observer.wrote(sum(sizes[name] for name in names))
            continue
        held = frozenset(names)
        with disk_errors(output.target):
            writer = ShardWriter(output.partial / file, held, job.metadata(names))
            try:
                for unit, made in entries.items():
                    if held.isdisjoint(entry.name for entry in made):
                        continue
                    for name, tensor in job.tensors(unit):
                        if name in held:
                            writer.add(name, tensor)
                            observer.wrote(sizes[name])
                writer.close()
            finally:
                writer.abandon()
            output.finish_file(file, job.notes)
    written = _written(output, files)
    if files.keys() != {SAFE_WEIGHTS_NAME}:
        with disk_errors(output.target):
            write_index(output.partial / SAFE_WEIGHTS_INDEX_NAME, files, written)
            sync(output.partial / SAFE_WEIGHTS_INDEX_NAME)
    return written


def _written(output: Output, files: Iterable[str]) -> int:
    """Size of the tensors in files that are complete, which earlier processes may have written."""
    return sum(data_bytes(output.partial / file) for file in files)


def planned_bytes(source: Source, units: Sequence[Unit], job: Job, *, beside: int = 0) -> int:
    """About how much disk `rewrite` takes, `beside` for other files."""
    return beside + SMALL_FILES + sum(entry.nbytes for made in _entries(source, units, job).values() for entry in made)


def _entries(source: Source, units: Sequence[Unit], job: Job) -> dict[Unit, list[Entry]]:
    """What is written for each unit, in the order in which their tensors are read."""
    return {unit: list(job.entries(unit)) for unit in _in_order(source, units)}


def _in_order(source: Source, units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which their tensors lie in the files."""
    order = {key: place for place, key in enumerate(key for shard in source.shards for key in shard.keys)}
    return sorted(units, key=lambda unit: min(order[key] for key in unit.keys))


def _files(source: Source, entries: Sequence[Entry], max_shard_size: str | None) -> dict[str, list[str]]:
    """Names of the tensors by file."""
    if max_shard_size is None:
        file_of = {key: shard.path.name for shard in source.shards for key in shard.keys}
        files: dict[str, list[str]] = {shard.path.name: [] for shard in source.shards}
        for entry in entries:
            files[file_of[entry.beside]].append(entry.name)
        return {file: names for file, names in files.items() if names}
    require_shard_size(max_shard_size)
    split = split_state_dict_into_shards_factory(
        {entry.name: entry for entry in entries},  # type: ignore[dict-item]  # looked at through the functions below
        get_storage_size=lambda entry: entry.nbytes,  # type: ignore[attr-defined]  # an Entry, as above
        get_storage_id=lambda entry: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size.upper(),
    )
    return {file: list(names) for file, names in split.filename_to_tensors.items()}
