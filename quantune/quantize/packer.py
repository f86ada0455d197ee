"""Which tensors of a checkpoint are packed, what becomes of each, and whether its reader takes it.

Everything is known before the first weight is read: names, sizes, and what the reader refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantune.backends.backend import layout_of, pack_weight
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.backends.readers import Destination, Reader
from quantune.errors import BackendError, ModelError
from quantune.model.adoption import stacks_rows
from quantune.model.quantizer import quantizable, quantizable_experts
from quantune.quantized import experts
from quantune.streaming.mapping import Unit

PACKED_FROM = torch.float32
"""What weights are packed from by default: rounded scales would cost accuracy."""


PLACE = "place"
DIGITS, SHORT = 32, 1024
"""Bytes: of a number that is written out, and of a text that may hold one."""


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """A tensor of the checkpoint that is packed."""

    key: str
    """Its name in the checkpoint that is read."""
    parameter: str
    """The model's parameter that it is, or is a part of."""
    destination: Destination
    layout: PackedLayout
    """Of the weight, or of each expert's."""
    stack: nn.Module | None = None
    """The module of the fused experts that the tensor holds, all in one."""
    count: int = 1
    """How many weights the tensor holds."""

    def weights(self, tensor: Tensor) -> list[Tensor]:
        """The weights in the tensor, shape (out features, in features) each."""
        return [tensor] if self.stack is None else [experts.as_rows(self.stack, expert) for expert in tensor]


@attrs.frozen(kw_only=True, eq=False)
class Packer:
    """Packs the tensors of a checkpoint for a reader."""

    reader: Reader
    dtype: torch.dtype
    """What the reader computes in."""
    packed_from: torch.dtype
    """What weights are packed from, in whatever dtype they are stored."""
    device: torch.device
    """Where weights are packed."""
    parts: Mapping[str, Part]
    """What is packed, by its name in the checkpoint that is read."""
    kept: tuple[str, ...]
    """Modules that the reader must leave in full precision."""
    sizes_of_layouts: dict[tuple[PackedLayout, str], dict[str, int]] = attrs.field(factory=dict)
    """Sizes of the stored tensors of a weight of a layout and last name, in a module called `PLACE`."""

    def sizes(self, part: Part) -> dict[str, int]:
        """Names of the tensors that a weight becomes, and their sizes in bytes, or a little more."""
        module, dot, leaf = part.destination.name.rpartition(".")
        key = part.layout, leaf
        if key not in self.sizes_of_layouts:
            zeros = PackedWeight(part.layout, torch.zeros(part.layout.nbytes, dtype=torch.uint8))
            tensors = self.reader.tensors(f"{PLACE}.{leaf}", zeros)
            self.sizes_of_layouts[key] = {name: tensor.nbytes + _more(tensor) for name, tensor in tensors.items()}
        sizes = self.sizes_of_layouts[key]
        return {f"{module}{dot}{name.removeprefix(PLACE + '.')}": part.count * nbytes for name, nbytes in sizes.items()}

    def pack(self, part: Part, tensor: Tensor) -> list[PackedWeight]:
        """The packed weights of a dense tensor.

        Raises:
            QuantizationError: a weight holds NaN or infinity, or values that the format can't hold.
        """
        packed = []
        for index, weight in enumerate(part.weights(tensor)):
            name = part.key if part.stack is None else f"{part.key}[{index}]"
            weight = weight.to(self.device, self.packed_from)
            packed.append(pack_weight(self.reader.backend, weight, self.reader.options, name=name))
        return packed

    def tensors(self, part: Part, packed: Sequence[PackedWeight]) -> dict[str, Tensor]:
        """The tensors that are stored for packed weights, by name."""
        # readers go by the dtype of the checkpoint, whatever one weight was stored in
        labelled = [PackedWeight(attrs.evolve(one.layout, dtype=self.dtype), one.data.cpu()) for one in packed]
        if part.stack is None:
            return self.reader.tensors(part.destination.name, labelled[0])
        return self.reader.stacked_tensors(part.destination.name, labelled)

    def metadata(self, others: Iterable[str]) -> dict[str, str]:
        """What the header of every file says; `others` are the tensors that are stored as they are."""
        layouts = {part.destination.name: attrs.evolve(part.layout, dtype=self.dtype) for part in self.parts.values()}
        return self.reader.metadata(layouts, others)


def _more(tensor: Tensor) -> int:
    """Bytes that a tensor may take more for other values than zeros: of a text in bytes, the digits of a number."""
    return DIGITS if tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.nbytes < SHORT else 0


def plan_packing(
    model: PreTrainedModel,
    units: Sequence[Unit],
    specs: Mapping[str, TensorSpec],
    reader: Reader,
    *,
    skip: tuple[str, ...],
    pack_experts: bool = True,
    dtype: torch.dtype,
    device: torch.device,
    packed_from: torch.dtype = PACKED_FROM,
) -> Packer:
    """Decide what of a checkpoint is packed.

    Args:
        model: on the meta device.
        units: how the checkpoint's tensors become the model's parameters.
        specs: the checkpoint's tensors.
        skip: patterns of modules that stay in full precision.

    Raises:
        ModelError: the checkpoint lacks a weight.
        BackendError: the reader does not take a weight; says which, why, and the way out.
    """
    linear = {f"{name}.weight" for name in quantizable(model, skip)}
    stacks = {name: module for module, _, name in quantizable_experts(model, skip, pack_experts)}
    parts: dict[str, Part] = {}
    refused: dict[str, str] = {}
    for unit in units:
        covered = [name for name in unit.parameters if name in linear or name in stacks]
        if not covered:
            continue
        if not _apart(unit):
            refused.update((name, "transformers makes it of other weights of the checkpoint") for name in covered)
            continue
        for key in unit.keys:
            part = _part(
                unit, key, specs[key], stacks.get(covered[0]), reader, dtype, packed_from, model.config.model_type
            )
            reason = reader.refusal(part.destination)
            if reason is not None:
                refused[key] = reason
            parts[key] = part
    found = {part.parameter for part in parts.values()} | refused.keys()
    missing = sorted(name for name in linear | stacks.keys() if name not in found)
    if missing:
        raise ModelError(f"the checkpoint lacks weights of its own architecture, e.g. {missing[0]}; fetch it again")
    refused.update(_torn_apart(stacks, model, skip))
    if refused:
        raise BackendError(_refusal(refused, reader, all_of_them=refused.keys() >= parts.keys()))
    packed = {part.parameter for part in parts.values()}
    kept = tuple(_kept(model, packed))
    return Packer(reader=reader, dtype=dtype, packed_from=packed_from, device=device, parts=parts, kept=kept)


def _apart(unit: Unit) -> bool:
    """Whether each tensor of a unit is a weight of its own: not converted, or an expert's that is merely stacked."""
    if unit.conversion is None:
        return True
    return unit.index is not None and stacks_rows(unit.conversion.converter.operations)


def _part(
    unit: Unit,
    key: str,
    spec: TensorSpec,
    stack: nn.Module | None,
    reader: Reader,
    dtype: torch.dtype,
    packed_from: torch.dtype,
    model_type: str,
) -> Part:
    parameter = unit.parameters[0]
    stacked = unit.conversion is None and stack is not None
    if stacked:
        assert stack is not None
        shape, count = experts.expert_shape(stack, torch.empty(spec.shape, device="meta")), spec.shape[0]
    else:
        shape, count = (spec.shape[0], spec.shape[1]), 1
    name = key if unit.conversion is not None else parameter if reader.model_names else unit.outputs[0]
    destination = Destination(
        name=name, shape=shape, dtype=dtype, expert=stack is not None, stacked=stacked, model_type=model_type
    )
    layout = layout_of(reader.backend, shape, packed_from, reader.options, name=key)
    return Part(
        key=key,
        parameter=parameter,
        destination=destination,
        layout=layout,
        stack=stack if stacked else None,
        count=count,
    )


def _torn_apart(stacks: Mapping[str, nn.Module], model: PreTrainedModel, skip: tuple[str, ...]) -> dict[str, str]:
    """Weights of experts of which others stay in full precision: readers replace the whole module."""
    torn = {}
    for name, module in stacks.items():
        prefix = name.rpartition(".")[0]
        rest = [leaf for leaf in experts.projections(module) if f"{prefix}.{leaf}" not in stacks]
        if rest:
            torn[name] = f"its module's {rest[0]} is skipped, and readers take all weights of experts packed or none"
    return torn


def _kept(model: PreTrainedModel, packed: set[str]) -> Iterator[str]:
    """Names of the modules that a reader would take for packed ones if it were not told."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if f"{name}.weight" not in packed:
                yield name
        elif experts.is_experts(module):
            if not any(f"{name}.{leaf}" in packed for leaf in experts.projections(module)):
                yield name


def _refusal(refused: Mapping[str, str], reader: Reader, *, all_of_them: bool) -> str:
    """A sentence on all weights that the reader does not take, and the way out."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [
        names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "") + f": {reason}"
        for reason, names in by_reason.items()
    ]
    options = " ".join(f"--skip {module}" for module in sorted({_module(name) for name in refused}))
    keep = "Choose" if all_of_them else f"Keep them in full precision with {options}, or choose"
    return (
        f"{reader.library} does not take {len(refused)} weights of this model packed: {'; '.join(lines)}. "
        f"{keep} another format"
    )


def _module(name: str) -> str:
    """The last part of a module's name, which `--skip` takes; of experts, that of all of them."""
    parts = name.removesuffix(".weight").split(".")
    return "experts" if "experts" in parts else parts[-1]
