"""A checkpoint that is already quantized, as if its weights were dense.

Its packed tensors are taken over as a run takes them over, and dequantized when they are read; everything else is as it
is in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantune.backends.backend import adopt_weight
from quantune.backends.layout import PackedWeight, TensorSpec
from quantune.errors import ModelError
from quantune.model.quantizer import QuantizationPlan
from quantune.quantized import experts
from quantune.streaming.mapping import units
from quantune.streaming.source import Shard, Source


@attrs.frozen(kw_only=True, eq=False)
class AdoptedSource(Source):
    """The tensors of a checkpoint, quantized weights under the names that dense ones would have."""

    stored: Source
    """The checkpoint as it is."""
    packed: Mapping[str, Mapping[str, str]]
    """The tensors that a quantized weight is stored as, by the backend's name for each, by dense name."""
    transposed: frozenset[str]
    """Those of them that a dense model holds as (..., in features, out features)."""
    plan: QuantizationPlan
    device: torch.device
    """Where weights are dequantized."""

    def read(self, key: str) -> Tensor:
        """One tensor; of a quantized weight what its codes say, fp32."""
        if key not in self.packed:
            return self.stored.read(key)
        if len(self.specs[key].shape) == 2:
            return self.plan.backend.dequantize(next(self.weights(key)), torch.float32)
        return torch.stack(list(self.experts(key)))

    def experts(self, key: str) -> Iterator[Tensor]:
        """The weights of fused experts that are quantized, one after the other, fp32, as a dense model holds them."""
        for packed in self.weights(key):
            dense = self.plan.backend.dequantize(packed, torch.float32)
            yield dense.T if key in self.transposed else dense

    def weights(self, key: str) -> Iterator[PackedWeight]:
        """The weights that a quantized tensor holds, as they are: one, or one for each expert."""
        parts = {part: self.stored.read(name) for part, name in self.packed[key].items()}
        shape = self.specs[key].shape
        rows, columns = (shape[-1], shape[-2]) if key in self.transposed else (shape[-2], shape[-1])
        stack = len(shape) == 3
        for index in range(shape[0] if stack else 1):
            one = {part: (tensor[index] if stack else tensor).to(self.device) for part, tensor in parts.items()}
            name = f"{key}[{index}]" if stack else key
            plan = self.plan
            yield adopt_weight(plan.backend, one, (rows, columns), plan.pack_dtype, plan.options, name=name)


def adopted(source: Source, model: PreTrainedModel, plan: QuantizationPlan, device: torch.device) -> AdoptedSource:
    """`source`, which `plan` takes over, for a model on the meta device.

    Raises:
        ModelError: tensors of a quantized weight are missing.
    """
    packed = _packed(source, plan)
    stored_as = {name: key for key, parts in packed.items() for name in parts.values()}
    shards = tuple(
        Shard(path=shard.path, keys=tuple(dict.fromkeys(stored_as.get(key, key) for key in shard.keys)))
        for shard in source.shards
    )
    first = {key: shard for shard in reversed(shards) for key in shard.keys}  # parts may lie in two files
    shards = tuple(attrs.evolve(one, keys=tuple(key for key in one.keys if first[key] is one)) for one in shards)
    specs = {key: spec for key, spec in source.specs.items() if key not in stored_as}
    shapes = {key: _shape(key, parts, source) for key, parts in packed.items()}
    parameters = _parameters(model, {**specs, **shapes})
    transposed = set()
    for key in packed:
        module, shape = parameters.get(key, (None, None))
        if shape is not None and len(shape) == 3:
            shapes[key] = TensorSpec(torch.float32, tuple(shape))
            if getattr(module, "is_transposed", False):
                transposed.add(key)
        elif shape is not None:
            shapes[key] = TensorSpec(torch.float32, tuple(shape))
    return AdoptedSource(
        shards=shards,
        specs={**specs, **shapes},
        files={},
        stored=source,
        packed=packed,
        transposed=frozenset(transposed),
        plan=plan,
        device=device,
    )


def _packed(source: Source, plan: QuantizationPlan) -> dict[str, dict[str, str]]:
    """The tensors of every quantized weight, by the name of the dense one."""
    found: dict[str, dict[str, str]] = {}
    for leaf in ("weight", *experts.PROJECTIONS):
        names = plan.backend.stored_names(f".{leaf}", plan.options)
        marking = next(name for name in names.values() if name != f".{leaf}")
        for key in source.specs:
            if key.endswith(marking):
                module = key.removesuffix(marking)
                parts = {part: f"{module}{name}" for part, name in names.items()}
                missing = [name for name in parts.values() if name not in source.specs]
                if missing:
                    raise ModelError(f"the checkpoint has {key} and lacks {missing[0]}; fetch it again")
                found[f"{module}.{leaf}"] = parts
    return found


def _shape(key: str, parts: Mapping[str, str], source: Source) -> TensorSpec:
    """The shape of the dense weight, where one of its tensors has it."""
    name = parts.get("weight", next(iter(parts.values())))
    return TensorSpec(torch.float32, source.specs[name].shape)


def _parameters(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Any, torch.Size]]:
    """Module and shape of the parameter that a tensor alone becomes."""
    found = {}
    for unit in units(model, specs):
        if unit.conversion is None and unit.parameters:
            module_name, _, leaf = unit.parameters[0].rpartition(".")
            module = model.get_submodule(module_name)
            parameters = dict(module.named_parameters(recurse=False))
            if leaf in parameters:
                shape = parameters[leaf].shape
                found[unit.keys[0]] = (module if experts.is_experts(module) else None, shape)
    return found
