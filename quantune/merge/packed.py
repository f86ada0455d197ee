"""Merging into packed weights: base and adapter added up, and packed again for the format's reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from quantune.backends.layout import PackedWeight
from quantune.errors import BackendError, InputError, QuantizationError
from quantune.merge.aware import pack_aware
from quantune.merge.opening import Opened
from quantune.merge.request import MergeRequest, Observer
from quantune.merge.trial import load_reference, prompts_for, reader_activations, require_memory
from quantune.merge.weights import MergeJob
from quantune.quantize.packer import Packer, Part, plan_packing
from quantune.quantize.quantize import Packing
from quantune.streaming.adopted import AdoptedSource
from quantune.streaming.mapping import Unit
from quantune.streaming.source import Source


def plan_packed(opened: Opened, found: Sequence[Unit], source: Source, dtype: torch.dtype) -> Packer:
    """What is packed: what was packed or rounded in training, from the dtype that it was packed from there.

    Raises:
        InputError: no library reads the format, or it does not take one of the weights.
    """
    plan = opened.format
    assert plan is not None
    activation_dtype = reader_activations(opened)
    try:
        return plan_packing(
            opened.model,
            found,
            source.specs,
            plan.backend.reader(plan.options, activation_dtype),
            skip=plan.skip,
            pack_experts=plan.experts,
            dtype=dtype,
            device=opened.device,
            packed_from=plan.pack_dtype,
        )
    except (BackendError, QuantizationError) as error:
        raise InputError(f"--onto packed: {error}; or merge with --onto dequantized, which needs no reader") from error


def require_choice(opened: Opened) -> None:
    """Require that there are roundings to choose.

    Raises:
        InputError: the run rounded in training, or the format's codes can't be chosen one by one.
    """
    if opened.setting.qat is not None:
        raise InputError(
            "--aware: a run with [training.qat] computed with packed weights already, and --onto packed writes those; "
            "leave it out"
        )
    plan = opened.plan
    if plan is not None and plan.backend.element_values(plan.options) is None:
        raise InputError(
            f"--aware: the backend {plan.backend.name} does not say which values its codes stand for, so none can be "
            "chosen; leave it out"
        )


def choose_weights(opened: Opened, request: MergeRequest, observer: Observer) -> Mapping[str, PackedWeight]:
    """The packed weights of adapted linear layers, by parameter, their roundings chosen for what the layers read.

    Raises:
        InputError: there is nothing to choose, or too little memory for base and adapter.
    """
    require_choice(opened)
    require_memory(opened, "--aware")
    model = load_reference(opened, request)
    prompts = prompts_for(opened, request, trained_on=True)
    if not prompts.own:
        observer.warning(f"roundings are chosen on {prompts.source}: they suit the adapter's own task less")
    made = pack_aware(model, opened.update.apply, prompts.windows, observer.phase)
    if not made.weights:
        raise InputError("--aware: the adapter is on no packed linear layer, so there is nothing to choose")
    return {f"{name}.weight": weight for name, weight in made.weights.items()}


def pack_into(job: MergeJob, packer: Packer, found: Sequence[Unit], chosen: Mapping[str, PackedWeight]) -> PackedMerge:
    """`job`, its weights packed, but for those that are `chosen` already, by parameter."""
    dense = attrs.evolve(job, kept_in=dict.fromkeys(packer.parts, packer.packed_from))
    return PackedMerge(dense=dense, packer=packer, units=found, chosen=chosen)


@attrs.frozen(kw_only=True, eq=False)
class PackedMerge(Packing):
    """Packs what is merged; what the adapter left alone keeps the bytes that it was trained with."""

    dense: MergeJob
    chosen: Mapping[str, PackedWeight]
    """Weights that are packed already, by parameter."""

    def pack(self, part: Part, tensor: Tensor) -> list[PackedWeight]:
        return [self.chosen[part.parameter]] if part.parameter in self.chosen else super().pack(part, tensor)

    def measure(self, unit: Unit, part: Part, dense: Tensor, packed: Sequence[PackedWeight], nbytes: int) -> None:
        """Nothing: what a merge loses is measured on its answers."""

    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        source = self.dense.source
        untouched = self.dense.changed.isdisjoint(unit.parameters)
        kept = isinstance(source, AdoptedSource) and untouched and source.packed.keys() >= {*unit.keys}
        if kept and self.packer.parts.keys() >= {*unit.keys}:  # not what the recipe skips: that is dense now
            assert isinstance(source, AdoptedSource)
            for key in unit.keys:
                yield from self.packer.tensors(self.packer.parts[key], list(source.weights(key))).items()
            return
        yield from super().tensors(unit)
