"""The weights of a merged model, one at a time: the base as it was trained on, or as it is, with what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.backends.backend import layout_of
from quantune.backends.kernels import is_finite
from quantune.backends.layout import PackedWeight
from quantune.errors import ModelError
from quantune.merge.updates import Update
from quantune.model.initialization import Initialization
from quantune.model.load import packed_digest
from quantune.model.quantizer import QuantizationPlan, packable
from quantune.model.vocabulary import fill_with_mean
from quantune.quantized import experts
from quantune.quantized.merged import pack_merged
from quantune.streaming.adopted import AdoptedSource
from quantune.streaming.mapping import Unit
from quantune.streaming.rewrite import Entry
from quantune.streaming.source import Source

Onto = Literal["dequantized", "original", "packed"]
ONTO: tuple[Onto, ...] = ("dequantized", "original", "packed")


@attrs.frozen(kw_only=True, eq=False)
class BaseWeights:
    """Every weight of a base as it was trained on."""

    model: PreTrainedModel
    """The base on the meta device."""
    plan: QuantizationPlan | None
    """How it was packed; None where it was not."""
    packed: frozenset[str]
    """The parameters that were packed."""
    initialization: Initialization | None
    """What took the adapter's share out of the weights."""
    dtype: torch.dtype
    """What the base was computed in."""
    device: torch.device
    digests: dict[str, str]
    """Of every weight that was packed here, by name."""
    rounded: frozenset[str] = frozenset()
    """The parameters that were trained as the format rounds them, with what was trained."""
    rounding: QuantizationPlan | None = None
    """What they were rounded with."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        plan: QuantizationPlan | None,
        initialization: Initialization | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rounded: frozenset[str] = frozenset(),
        rounding: QuantizationPlan | None = None,
    ) -> BaseWeights:
        """Those of `model`, on the meta device and without an adapter."""
        names = set() if plan is None else packable(model, plan.skip, plan.experts)
        weights = {name if _is_parameter(model, name) else f"{name}.weight" for name in names}
        return cls(
            model=model,
            plan=plan,
            packed=frozenset(weights),
            initialization=initialization,
            dtype=dtype,
            device=device,
            digests={},
            rounded=rounded,
            rounding=rounding,
        )

    def dense(self, name: str, weight: Tensor, expert: int | None, *, dequantized: bool) -> Tensor:
        """A weight as the adapter met it, fp32: one that was packed is packed and dequantized.

        Args:
            weight: as the checkpoint has it, (out features, in features) where it is packed.
            expert: its place in the stack.
            dequantized: the checkpoint itself stores it packed, and these are the values.
        """
        if dequantized:
            return weight.to(self.device, torch.float32)
        if name in self.packed:
            return self._round_trip(name, weight, expert)
        weight = weight.to(self.device, self.dtype)
        if self.initialization is not None:
            layer = name.removesuffix(".weight")
            weight = self.initialization.split(layer, weight, None)
            self.initialization.factors.pop(layer, None)
        return weight.to(torch.float32, copy=True)

    def unpacked(self, name: str, weight: Tensor, expert: int | None) -> Tensor:
        """A weight as the checkpoint has it, fp32, less what the adapter began with."""
        dense = weight.to(self.device, torch.float32, copy=True)
        layer = name.removesuffix(".weight")
        if self.initialization is None or layer not in self.initialization.names:
            return dense
        if name in self.packed:
            self._pack(name, weight, expert)
        else:
            self.initialization.split(layer, weight.to(self.device, self.dtype), None)
        factors = self.initialization.factors.pop(layer, None)  # none where nothing is lost that could be taken
        return dense if factors is None else dense - self.initialization.update_of(factors)

    def as_rounded(self, name: str, weight: Tensor, expert: int | None) -> Tensor:
        """A merged weight, fp32, as a run with `[training.qat]` computed with it."""
        if name not in self.rounded:
            return weight
        assert self.rounding is not None
        backend, shape = self.rounding.backend, (weight.shape[0], weight.shape[1])
        label = name if expert is None else f"{name}[{expert}]"
        layout = layout_of(backend, shape, self.rounding.pack_dtype, self.rounding.options, name=label)
        return backend.dequantize(pack_merged(backend, weight, layout, name=label), torch.float32)

    def _round_trip(self, name: str, weight: Tensor, expert: int | None) -> Tensor:
        assert self.plan is not None
        data = self._pack(name, weight, expert)
        if self.initialization is not None:
            self.initialization.factors.pop(name.removesuffix(".weight"), None)
        shape = (weight.shape[0], weight.shape[1])
        layout = layout_of(self.plan.backend, shape, self.plan.pack_dtype, self.plan.options, name=name)
        return self.plan.backend.dequantize(PackedWeight(layout, data), torch.float32)

    def _pack(self, name: str, weight: Tensor, expert: int | None) -> Tensor:
        assert self.plan is not None
        label = name if expert is None else f"{name}[{expert}]"
        data = self.plan.pack(weight.to(self.device), label)
        self.digests[label] = packed_digest(data)
        return data


@attrs.frozen(kw_only=True, eq=False)
class MergeJob:
    """Writes base and adapter as dense weights; everything that neither touches is copied as it is."""

    source: Source
    base: BaseWeights
    update: Update
    changed: frozenset[str]
    """The parameters that the update changes."""
    onto: Onto
    vocabulary: frozenset[str]
    """Weights that have a row for every token, where the recipe adds some."""
    dtype: torch.dtype | None
    """What the weights are written in; None for what the checkpoint has them in."""
    main_dtype: torch.dtype
    """What the checkpoint has most of its weights in."""
    quantized: frozenset[str]
    """The tensors that the checkpoint itself stores packed."""
    kept_in: Mapping[str, torch.dtype] = attrs.field(factory=dict)
    """Tensors that are given in another dtype than they are written in, because they are packed from it."""
    checked: set[int] = attrs.field(factory=set)
    """Converters that were tried, by identity."""

    @property
    def notes(self) -> dict[str, str]:
        """The digests of what was packed."""
        return self.base.digests

    def entries(self, unit: Unit) -> Sequence[Entry]:
        shapes = self._grown_shapes(unit)
        return [
            Entry(
                name=name,
                nbytes=shapes.get(name, torch.Size(self.source.specs[key].shape)).numel()
                * self._dtype_of(key).itemsize,
                beside=key,
            )
            for name, key in zip(unit.outputs, unit.keys, strict=True)
        ]

    @torch.no_grad()
    def tensors(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        if not any(self.touches(name, unit) for name in unit.parameters):
            for name, key in zip(unit.outputs, unit.keys, strict=True):
                tensor, dtype = self.source.read(key), self._dtype_of(key)
                yield name, tensor if tensor.dtype == dtype else self._rounded(name, tensor, dtype)
            return
        if isinstance(self.source, AdoptedSource) and unit.conversion is None and self._is_stack(unit):
            yield unit.outputs[0], self._adopted_stack(unit, self.source)
            return
        self._check_conversion(unit)
        loaded = unit.load(self.source.read)
        dtype = self._dtype_of(unit.keys[0])
        made = {}
        for name in unit.parameters:
            made[name] = self._parameter(name, loaded.pop(name), unit, dtype)
        yield from unit.restore(made).items()

    def metadata(self, names: Iterable[str]) -> Mapping[str, str]:
        return {"format": "pt"}

    def touches(self, name: str, unit: Unit) -> bool:
        """Whether a parameter is written as something else than the checkpoint has."""
        dense = self.onto == "dequantized" and (name in self.base.packed or self._split(name))
        return dense or name in self.changed or self._rows(name, unit) is not None or unit.keys[0] in self.quantized

    def _check_conversion(self, unit: Unit) -> None:
        """Try each kind of conversion, on the first weight that it makes, before it is relied on."""
        if unit.conversion is not None and id(unit.conversion.converter) not in self.checked:
            unit.require_reversible(self.source.read)
            self.checked.add(id(unit.conversion.converter))

    def _parameter(self, name: str, value: Tensor, unit: Unit, dtype: torch.dtype) -> Tensor:
        """A parameter as it is written."""
        module = self.base.model.get_submodule(name.rpartition(".")[0])
        if value.dim() == 3 and experts.is_experts(module):
            out = torch.empty(value.shape, dtype=dtype)
            for place in range(len(value)):
                expert = place if unit.index is None else unit.index
                rows = self._weight(name, experts.as_rows(module, value[place]), expert, unit)
                out[place] = experts.as_rows(module, self._rounded(name, rows, dtype))
            return out
        count = self._rows(name, unit)
        if count is not None:
            value = _grown(value, count, self.base.dtype)
        return self._rounded(name, self._weight(name, value, None, unit), dtype)

    def _is_stack(self, unit: Unit) -> bool:
        return unit.keys[0] in self.quantized and len(self.source.specs[unit.keys[0]].shape) == 3

    def _adopted_stack(self, unit: Unit, source: AdoptedSource) -> Tensor:
        """Fused experts that the checkpoint stores packed; no two of them are in full precision at once."""
        (key,), (name,) = unit.keys, unit.parameters
        module = self.base.model.get_submodule(name.rpartition(".")[0])
        out = torch.empty(source.specs[key].shape, dtype=self._dtype_of(key))
        for expert, dense in enumerate(source.experts(key)):
            rows = self._weight(name, experts.as_rows(module, dense), expert, unit)
            out[expert] = experts.as_rows(module, self._rounded(name, rows, out.dtype))
        return out

    def _weight(self, name: str, value: Tensor, expert: int | None, unit: Unit) -> Tensor:
        if name not in self.changed and name not in self.base.packed and not self._split(name):
            return value.float()
        if self.onto == "original" and self.base.plan is not None:
            weight = self.base.unpacked(name, value, expert)
        else:
            weight = self.base.dense(name, value, expert, dequantized=unit.keys[0] in self.quantized)
        merged = self.update.apply(name, weight, expert) if name in self.changed else weight
        return self.base.as_rounded(name, merged, expert) if self.onto == "dequantized" else merged

    def _rounded(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        rounded = weight.to(dtype).cpu()
        if is_finite(rounded):
            return rounded
        if not is_finite(weight):
            raise ModelError(f"{name}: what would be written holds NaN or infinity; nothing was merged")
        raise ModelError(
            f"{name}: what would be written reaches {weight.abs().max():.3g}, more than {_short(dtype)} holds; use "
            "--dtype bf16"
        )

    def _split(self, name: str) -> bool:
        split = self.base.initialization
        return split is not None and name.removesuffix(".weight") in split.names

    def _rows(self, name: str, unit: Unit) -> int | None:
        """How many rows a parameter of the vocabulary is to have; None where it keeps those that it has."""
        if name not in self.vocabulary:
            return None
        rows = int(self.base.model.get_parameter(name).shape[0])
        return None if rows == self.source.specs[unit.keys[0]].shape[0] else rows

    def _grown_shapes(self, unit: Unit) -> dict[str, torch.Size]:
        if unit.conversion is None and unit.parameters and self._rows(unit.parameters[0], unit) is not None:
            return {unit.outputs[0]: self.base.model.get_parameter(unit.parameters[0]).shape}
        return {
            name: torch.Size(self.source.specs[key].shape) for name, key in zip(unit.outputs, unit.keys, strict=True)
        }

    def _dtype_of(self, key: str) -> torch.dtype:
        if key in self.kept_in:
            return self.kept_in[key]
        stored = self.source.specs[key].dtype
        if key in self.quantized:
            return self.dtype or self.main_dtype
        return self.dtype if self.dtype is not None and stored == self.main_dtype else stored


def vocabulary_weights(model: PreTrainedModel) -> frozenset[str]:
    """Names of the weights of a model that have a row for every token."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return frozenset(
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if any(module is end for end in ends)
        for leaf, _ in module.named_parameters(recurse=False)
    )


def _grown(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The weight with so many rows; new ones are the mean of the old, as computed in `dtype`."""
    more = weight.new_empty(rows - len(weight), *weight.shape[1:])
    computed = torch.cat([weight, more]).to(dtype)
    fill_with_mean(computed, len(weight))
    return torch.cat([weight.float(), computed[len(weight) :].float()])


def _is_parameter(model: nn.Module, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    return leaf in dict(model.get_submodule(module_name).named_parameters(recurse=False))


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
