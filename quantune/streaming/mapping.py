"""Which tensors of a checkpoint make which parameters of a model, and back, as transformers' own loading has it.

An architecture may rename, transpose, split or fuse what a checkpoint stores. Tensors that go into one conversion are a
unit: it is loaded as parameters, changed, and written back under the names and in the shapes it came in. Experts that a
checkpoint stores one by one are units of their own, one for each, though the model holds them fused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from quantune.backends.layout import TensorSpec
from quantune.errors import ModelError
from quantune.quantized import experts


@attrs.frozen(kw_only=True, eq=False)
class Unit:
    """Tensors of a checkpoint that are converted together."""

    keys: tuple[str, ...]
    """The names they have in the checkpoint that is read, by pattern of the converter and in natural order."""
    parameters: tuple[str, ...] = ()
    """Names of the model's parameters that they become; none for what the model does not have."""
    conversion: Conversion | None = None
    """None where the one tensor is the one parameter."""
    index: int | None = None
    """Which expert this is, of fused ones that the checkpoint stores one by one."""
    written_as: str | None = None
    """What the one tensor is called in the checkpoint that is written, where that is another name."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names in the checkpoint that is written."""
        return self.keys if self.written_as is None else (self.written_as,)

    def load(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name; of experts that are units of their own, one: shape (1, ...)."""
        if self.conversion is None:
            return {self.parameters[0]: read(self.keys[0])}
        return self.conversion.load(self.keys, self.index, read)

    def restore(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is written, from parameters as `load` gives them."""
        if self.conversion is None:
            return {self.outputs[0]: parameters[self.parameters[0]]}
        return self.conversion.restore(self.keys, [parameters[name] for name in self.parameters], self.index)

    def require_reversible(self, read: Callable[[str], Tensor]) -> None:
        """Require that what was loaded is written back bit for bit.

        Raises:
            ModelError: it is not.
        """
        for name, tensor in self.restore(self.load(read)).items():
            if not torch.equal(tensor, read(name)):
                raise ModelError(f"{name}: transformers converts this weight in a way that it does not undo exactly")


@attrs.frozen(kw_only=True, eq=False)
class Conversion:
    """What transformers does with the tensors of a unit, and its opposite."""

    model: PreTrainedModel
    """The model, on the meta device; some operations look at its configuration and shapes."""
    target: str
    """The parameter that the unit is loaded for; the first of several."""
    converter: WeightConverter
    counts: tuple[int, ...]
    """How many tensors each pattern of the converter has."""

    def load(self, keys: Sequence[str], index: int | None, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self._by_pattern(keys, index):
            for name in names:
                converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))  # type: ignore[arg-type]  # or a function
        converted = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def restore(self, keys: Sequence[str], parameters: Sequence[Tensor], index: int | None) -> dict[str, Tensor]:
        """The tensors of the checkpoint by name.

        Raises:
            ModelError: transformers can't undo this conversion.
        """
        try:
            reverse: Any = self.converter.reverse_transform()
            tensors: dict[str, Any] = _shared_out(reverse.source_patterns, parameters)
            for operation in reverse.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=reverse.source_patterns,
                    target_patterns=reverse.target_patterns,
                    full_layer_name=self.target,
                    model=self.model,
                    config=self.model.config,
                    missing_keys=None,
                )
            restored = {}
            for pattern, (_, names) in zip(reverse.target_patterns, self._by_pattern(keys, index), strict=True):
                for position, name in enumerate(names):
                    value = tensors[pattern.replace("*", str(position)) if "*" in pattern else pattern]
                    restored[name] = value[0] if isinstance(value, list) else value
            return restored
        except (NotImplementedError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"{self.target}: transformers makes this weight of {len(keys)} tensors of the checkpoint, and can't "
                f"make them of it again: {error}"
            ) from error

    def _by_pattern(self, keys: Sequence[str], index: int | None) -> Iterator[tuple[str, Sequence[str]]]:
        start = 0
        for pattern, count in zip(self.converter.source_patterns, self.counts, strict=True):
            count = count if index is None else 1
            yield pattern, keys[start : start + count]
            start += count


def units(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> list[Unit]:
    """How the tensors of a checkpoint become the parameters of `model`, which is on the meta device.

    Args:
        specs: the checkpoint's tensors.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    made: list[Unit] = []
    converted: dict[str, dict[str, list[str]]] = {}
    for key in sorted(specs, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            made.append(Unit(keys=(key,)))
        elif pattern is None:
            made.append(Unit(keys=(key,), parameters=(name,)))
        else:
            converted.setdefault(name, {}).setdefault(pattern, []).append(key)
    for target, found in converted.items():
        made += _converted(model, target, found, by_pattern[next(iter(found))], specs)
    return made


def checkpoint_name(model: PreTrainedModel, parameter: str) -> str:
    """What a checkpoint calls a parameter that is stored as it is."""
    tensor = torch.empty(0, device="meta")
    (name,) = revert_weight_conversion(model, {parameter: tensor})
    return str(name)


def _converted(
    model: PreTrainedModel,
    target: str,
    found: Mapping[str, list[str]],
    converter: WeightConverter,
    specs: Mapping[str, TensorSpec],
) -> Iterator[Unit]:
    """The units of one conversion: one for each expert where they are stored one by one, or one."""
    counts = tuple(len(found.get(pattern, ())) for pattern in converter.source_patterns)
    conversion = Conversion(model=model, target=target, converter=converter, counts=counts)
    rows = [found[pattern] for pattern in converter.source_patterns if pattern in found]
    if _one_by_one(model, target, converter, counts):
        for index, keys in enumerate(zip(*rows, strict=True)):
            yield Unit(keys=keys, parameters=(target,), conversion=conversion, index=index)
        return
    keys = tuple(key for row in rows for key in row)
    names = conversion.load(keys, None, lambda key: torch.empty(specs[key].shape, device="meta"))
    yield Unit(keys=keys, parameters=tuple(names), conversion=conversion)


def _one_by_one(model: PreTrainedModel, target: str, converter: WeightConverter, counts: tuple[int, ...]) -> bool:
    """Whether a conversion merely fuses experts, so that it can be done for each alone."""
    module_name, _, leaf = target.rpartition(".")
    if leaf not in experts.PROJECTIONS or not experts.is_experts(model.get_submodule(module_name)):
        return False
    every = all("*" in pattern for pattern in converter.source_patterns)
    return every and len(converter.target_patterns) == 1 and len(set(counts)) == 1


def _shared_out(patterns: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The parameters by pattern: each its own, or all of them the one."""
    if len(patterns) == 1:
        return {patterns[0]: list(parameters)}
    return {pattern: [parameter] for pattern, parameter in zip(patterns, parameters, strict=True)}
