"""Packing a checkpoint tensor by tensor, and saying how far the packed weights are from the original ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import quantune
from quantune.backends import registry
from quantune.backends.checkpoints import in_words
from quantune.backends.readers import dtype_name
from quantune.comparison.rows import LayerFigures
from quantune.comparison.weights import Sums, kind_of, power
from quantune.errors import InputError, QuantizationError
from quantune.model.base import Base, skeleton
from quantune.model.load import check_plan
from quantune.quantize.choice import Choice
from quantune.quantize.files import REPORT, copy_beside, write_json
from quantune.quantize.packer import Packer, Part, plan_packing
from quantune.streaming.mapping import Unit, units
from quantune.streaming.output import Output, open_output
from quantune.streaming.rewrite import Entry, Observer, rewrite
from quantune.streaming.source import Source, base_folder, open_source


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
            **attrs.asdict(self, filter=attrs.filters.include("library", "nbytes", "before")),
            "folder": str(self.folder),
            "weights": _figures(self.total),
            "kinds": [_figures(kind) for kind in self.kinds],
        }


def quantize(
    base: Base,
    choice: Choice,
    out: Path,
    *,
    device: torch.device,
    observer: Observer,
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> Quantized:
    """Pack the checkpoint of `base` into the folder `out`, one tensor after the other.

    Raises:
        InputError: the model is already quantized, or `out` exists or does not fit onto the disk.
        ModelError: a pattern of skip names nothing, or the checkpoint can't be read.
        QuantizationError: the format has no reader, the reader does not take a weight, or a weight can't be packed.
        CheckpointError: `out` can't be written.
    """
    if base.stored is not None:
        raise InputError(
            f"{base.name} is already quantized ({in_words(base.stored)}); quantizing it again would add one error to "
            "another. Choose the unquantized model"
        )
    quantization = choice.quantization
    backend = registry.load_backend(registry.describe_available(quantization.backend))
    reader = backend.reader(quantization.options, choice.activation_dtype)
    model = skeleton(base)
    check_plan(model, quantization, device)
    folder = base_folder(base)
    with open_source(folder) as source:
        found = units(model, source.specs)
        dtype = base.config.dtype if isinstance(base.config.dtype, torch.dtype) else _common_dtype(source)
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
        job = Quantizing(source=source, packer=packer, units=found)
        identity = _identity(base, choice, source)
        with open_output(out, report=REPORT, identity=identity, overwrite=overwrite) as output:
            nbytes = rewrite(source, found, job, output, observer, max_shard_size=max_shard_size)
            figures = job.figures()
            made = Quantized(
                folder=output.target,
                library=reader.library,
                nbytes=nbytes,
                before=source.nbytes,
                total=figures[0],
                kinds=figures[1],
            )
            _finish(output, folder, base, packer, {**identity, **made.as_dict()})
    return made


@attrs.define(kw_only=True, eq=False)
class Quantizing:
    """What is written for each tensor of a checkpoint: a packed weight, or the tensor as it is."""

    source: Source
    packer: Packer
    units: Sequence[Unit]
    notes: dict[str, str] = attrs.field(factory=dict)
    """By packed tensor: layers, weights, bytes, and the squares of error and signal, as JSON."""

    def entries(self, unit: Unit) -> list[Entry]:
        """The tensors that are written for a unit, and their sizes."""
        entries = []
        for key, name in zip(unit.keys, _names(unit), strict=True):
            part = self.packer.parts.get(key)
            sizes = {name: self.source.specs[key].nbytes} if part is None else self.packer.sizes(part)
            entries += [Entry(name=name, nbytes=nbytes, beside=key) for name, nbytes in sizes.items()]
        return entries

    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        """The tensors that are written for a unit, by name."""
        for key, name in zip(unit.keys, _names(unit), strict=True):
            part, tensor = self.packer.parts.get(key), self.source.read(key)
            if part is None:
                yield name, tensor
            else:
                yield from self._packed(unit, part, tensor).items()

    def metadata(self, names: Iterable[str]) -> Mapping[str, str]:
        """The header of a file: that of the whole checkpoint, because readers put those of all files together."""
        others = [
            name
            for unit in self.units
            for key, name in zip(unit.keys, _names(unit), strict=True)
            if key not in self.packer.parts
        ]
        return {"format": "pt", **self.packer.metadata(others)}

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

    @torch.no_grad()
    def _packed(self, unit: Unit, part: Part, dense: Tensor) -> dict[str, Tensor]:
        packed = self.packer.pack(part, dense)
        tensors = self.packer.tensors(part, packed)
        error = signal = 0.0
        backend = self.packer.reader.backend
        for one, weight in zip(packed, part.weights(dense), strict=True):
            original = weight.to(one.data.device, torch.float32)
            error += power(backend.dequantize(one, torch.float32) - original)
            signal += power(original)
        first = unit.index in (None, 0) and part.key == unit.keys[0]  # fused experts count as one layer
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.notes[part.key] = json.dumps([int(first), dense.numel(), nbytes, error, signal])
        return tensors


def _names(unit: Unit) -> tuple[str, ...]:
    return unit.outputs


def _common_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a checkpoint's numbers."""
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    if not sizes:
        raise QuantizationError("expected floating-point weights in the checkpoint, found none")
    return max(sizes, key=lambda dtype: sizes[dtype])


def _identity(base: Base, choice: Choice, source: Source) -> dict[str, Any]:
    """What is written, from what."""
    return {
        "quantune": quantune.__version__,
        "model": base.name,
        "files": {shard.path.name: shard.path.stat().st_size for shard in source.shards},
        "format": choice.format,
        "options": attrs.asdict(choice.quantization.options),
        "skip": list(choice.quantization.skip),
        "activation_dtype": choice.activation_dtype,
    }


def _finish(output: Output, folder: Path, base: Base, packer: Packer, report: Mapping[str, Any]) -> None:
    """Write what lies beside the weights, `config.json` last, and give the folder its name."""
    copy_beside(folder, output.partial)
    write_json(output.partial / REPORT, report)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("dtype", config.get("torch_dtype")) is None:
        config["dtype"] = dtype_name(packer.dtype)
    config["quantization_config"] = packer.reader.quantization_config(packer.kept, packer.dtype)
    write_json(output.partial / "config.json", config)
    output.publish()


def _figures(figures: LayerFigures) -> dict[str, Any]:
    return {**attrs.asdict(figures), "bits_per_weight": figures.bits_per_weight, "snr_db": figures.snr_db}
