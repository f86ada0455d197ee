"""Packing a checkpoint tensor by tensor, and saying how far the packed weights are from the original ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

import quantune
from quantune.backends import registry
from quantune.backends.checkpoints import in_words
from quantune.backends.layout import PackedWeight
from quantune.checkpoint.commit import write_file_atomically
from quantune.checkpoint.fingerprint import environment
from quantune.comparison.rows import LayerFigures
from quantune.comparison.weights import Sums, kind_of, power
from quantune.errors import BackendError, InputError, QuantizationError
from quantune.model.base import Base, skeleton
from quantune.model.load import check_plan
from quantune.quantize import REPORT
from quantune.quantize.choice import Choice
from quantune.quantize.packer import Packer, Part, plan_packing
from quantune.recipe.schema import ModelConfig
from quantune.streaming.companions import companion_bytes, write_companions
from quantune.streaming.mapping import Unit, units
from quantune.streaming.output import disk_errors, open_output
from quantune.streaming.rewrite import Entry, Job, Observer, rewrite
from quantune.streaming.source import Source, base_folder, main_dtype, open_source


@attrs.frozen(kw_only=True)
class Quantized:
    """What `quantize` made."""

    folder: Path
    library: str
    """Who reads it."""
    nbytes: int
    """Size of all tensors."""
    before: int
    """Size of those it was made from."""
    total: LayerFigures
    """All packed weights."""
    kinds: tuple[LayerFigures, ...]
    """The same by kind of layer."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, derived figures included."""
        return {
            "library": self.library,
            "nbytes": self.nbytes,
            "before": self.before,
            "weights": _figures(self.total),
            "kinds": [_figures(kind) for kind in self.kinds],
        }


def quantize(
    base: Base,
    choice: Choice,
    out: Path,
    *,
    device: torch.device,
    observer: PackingObserver,
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> Quantized:
    """Pack the checkpoint of `base` into the folder `out`, one tensor after the other.

    Raises:
        InputError: the model is already quantized, or `out` exists or does not fit onto the disk.
        ModelError: a pattern of skip names nothing, or the checkpoint can't be read.
        BackendError: the format has no reader, or the reader does not take a weight.
        QuantizationError: a weight can't be packed.
        CheckpointError: `out` can't be written.
    """
    if base.stored is not None:
        raise InputError(
            f"{base.name} is already quantized ({in_words(base.stored)}); quantizing it again would add one error to "
            "another. Choose the unquantized model"
        )
    quantization = choice.quantization
    backend = registry.load_backend(registry.describe_available(quantization.backend))
    try:
        reader = backend.reader(quantization.options, choice.activation_dtype)
    except QuantizationError as error:
        raise BackendError(str(error)) from error
    model = skeleton(base)
    check_plan(model, quantization, device)
    folder = base_folder(base)
    with open_source(folder) as source:
        found = units(model, source.specs)
        dtype = base.config.dtype if isinstance(base.config.dtype, torch.dtype) else main_dtype(source)
        packer = plan_packing(
            model,
            found,
            source.specs,
            reader,
            skip=quantization.skip,
            pack_experts=quantization.experts,
            dtype=dtype,
            device=device,
        )
        job = Packing(dense=Copying(source=source), packer=packer, units=found)
        observer.phase("packing")
        asked = _asked(base, choice)
        identity = {**asked, "files": _files(source), "max_shard_size": max_shard_size}
        with open_output(out, report=REPORT, identity=identity, overwrite=overwrite) as output:
            nbytes = rewrite(
                source, found, job, output, observer, beside=companion_bytes(folder), max_shard_size=max_shard_size
            )
            figures = job.figures()
            made = Quantized(
                folder=output.target,
                library=reader.library,
                nbytes=nbytes,
                before=source.nbytes,
                total=figures[0],
                kinds=figures[1],
            )
            with disk_errors(output.target):
                setting = ModelConfig(base=base.name)
                stored = reader.quantization_config(packer.kept, dtype)
                write_companions(output.partial, base, folder, setting, model, dtype=dtype, quantization_config=stored)
                write_file_atomically(output.partial / REPORT, json.dumps({**asked, **made.as_dict()}, indent=2))
                output.publish()
    return made


class PackingObserver(Observer, Protocol):
    """Is told how it goes on."""

    def phase(self, text: str) -> None:
        """What is being done now."""


@attrs.frozen(kw_only=True, eq=False)
class Copying:
    """Writes the tensors of a checkpoint as they are."""

    source: Source
    notes: dict[str, str] = attrs.field(factory=dict)

    def entries(self, unit: Unit) -> Sequence[Entry]:
        """The tensors of a unit, and their sizes."""
        named = zip(unit.outputs, unit.keys, strict=True)
        return [Entry(name=name, nbytes=self.source.specs[key].nbytes, beside=key) for name, key in named]

    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        """The tensors of a unit, by name."""
        for name, key in zip(unit.outputs, unit.keys, strict=True):
            yield name, self.source.read(key)

    def metadata(self, names: Iterable[str]) -> Mapping[str, str]:
        """The header of a file."""
        return {"format": "pt"}


@attrs.frozen(kw_only=True, eq=False)
class Packing:
    """Packs what another job writes."""

    dense: Job
    """Gives every tensor in full precision."""
    packer: Packer
    units: Sequence[Unit]
    """Of the whole checkpoint."""
    notes: dict[str, str] = attrs.field(factory=dict)
    """By packed tensor: layers, weights, bytes, and the squares of error and signal, as JSON."""

    def entries(self, unit: Unit) -> Sequence[Entry]:
        """The tensors that are written for a unit, and their sizes."""
        entries = []
        for entry in self.dense.entries(unit):
            part = self.packer.parts.get(entry.beside)
            sizes = {entry.name: entry.nbytes} if part is None else self.packer.sizes(part)
            entries += [Entry(name=name, nbytes=nbytes, beside=entry.beside) for name, nbytes in sizes.items()]
        return entries

    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        """The tensors that are written for a unit, by name."""
        keys = dict(zip(unit.outputs, unit.keys, strict=True))
        for name, tensor in self.dense.tensors(unit):
            part = self.packer.parts.get(keys[name])
            if part is None:
                yield name, tensor
            else:
                yield from self._packed(unit, part, tensor).items()

    def metadata(self, names: Iterable[str]) -> Mapping[str, str]:
        """The header of a file: that of the whole checkpoint, because readers put those of all files together."""
        keys = [pair for unit in self.units for pair in zip(unit.outputs, unit.keys, strict=True)]
        others = [name for name, key in keys if key not in self.packer.parts]
        return {**self.dense.metadata(names), **self.packer.metadata(others)}

    def figures(self) -> tuple[LayerFigures, tuple[LayerFigures, ...]]:
        """How far the packed weights are from the original ones: all of them, and by kind of layer."""
        kinds: dict[str, Sums] = {}
        for part in self.packer.parts.values():
            kind = kind_of(part.parameter)
            kinds[kind] = kinds.get(kind, Sums()) + Sums(*json.loads(self.notes[part.key]))
        total = Sums()
        for sums in kinds.values():
            total += sums
        return total.figures("all"), tuple(sums.figures(kind) for kind, sums in kinds.items())

    def pack(self, part: Part, tensor: Tensor) -> list[PackedWeight]:
        """The packed weights of a dense tensor."""
        return self.packer.pack(part, tensor)

    @torch.no_grad()
    def _packed(self, unit: Unit, part: Part, dense: Tensor) -> dict[str, Tensor]:
        packed = self.pack(part, dense)
        tensors = self.packer.tensors(part, packed)
        self.measure(unit, part, dense, packed, sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    def measure(self, unit: Unit, part: Part, dense: Tensor, packed: Sequence[PackedWeight], nbytes: int) -> None:
        """Note how far the packed weights, stored in so many bytes, are from the dense ones."""
        error = signal = 0.0
        backend = self.packer.reader.backend
        for one, weight in zip(packed, part.weights(dense), strict=True):
            original = weight.to(one.data.device, torch.float32)
            error += power(backend.dequantize(one, torch.float32) - original)
            signal += power(original)
        first = unit.index in (None, 0) and part.key == unit.keys[0]  # fused experts count as one layer
        self.notes[part.key] = json.dumps([int(first), dense.numel(), nbytes, error, signal])


def _files(source: Source) -> dict[str, list[int]]:
    """Size and time of the files that are read, by which a process that goes on knows them."""
    found = {shard.path.name: shard.path.stat() for shard in source.shards}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _asked(base: Base, choice: Choice) -> dict[str, Any]:
    """What is packed, and into what, as the report says it."""
    return {
        "quantune": quantune.__version__,
        "versions": environment()["versions"],
        "model": base.name,
        "format": choice.format,
        "options": attrs.asdict(choice.quantization.options),
        "skip": list(choice.quantization.skip),
        "activation_dtype": choice.activation_dtype,
    }


def _figures(figures: LayerFigures) -> dict[str, Any]:
    return {**attrs.asdict(figures), "bits_per_weight": figures.bits_per_weight, "snr_db": figures.snr_db}
