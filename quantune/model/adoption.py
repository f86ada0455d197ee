"""Taking over a checkpoint that is already in a backend's format, bit for bit.

The checkpoint's tensors become packed bytes without passing through full precision. What the checkpoint itself keeps in
full precision stays so; layers that the recipe skips are dequantized, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers import HfQuantizer

from quantune.backends.backend import adopt_weight
from quantune.backends.checkpoints import as_stored, format_problem
from quantune.errors import ModelError, QuantizationError
from quantune.model.names import KeptPattern
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear, WeightFormat
from quantune.recipe.schema import QuantizationConfig

if TYPE_CHECKING:
    from quantune.model.quantizer import QuantizationPlan


def take_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a checkpoint's `config.json` says of its quantization, also for a text model within another; None where it
    says nothing.

    It is taken out of `config`, or transformers would load the checkpoint in its own way.
    """
    stored = None
    for table in (config.get_text_config(), config):
        found = getattr(table, "quantization_config", None)
        if found is not None:
            stored = dict(found) if isinstance(found, Mapping) else found.to_dict()
        if hasattr(table, "quantization_config"):
            del table.quantization_config
    return stored


def quantization_over(
    base: str, stored: Mapping[str, Any], quantization: QuantizationConfig | None
) -> QuantizationConfig:
    """How a base that is already quantized is stored: as `quantization` says, or as it is when that says nothing.

    Raises:
        ModelError: it is quantized in another way, or in one that quantune has not; says the way out.
    """
    problem = format_problem(stored, quantization)
    if problem is not None:
        raise ModelError(f"[model] base = {json.dumps(base)} {problem.message}; {problem.way_out}")
    chosen = quantization or as_stored(stored)
    assert chosen is not None
    return chosen


def kept_modules(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that the checkpoint keeps in full precision, as patterns of `skip`."""
    listed = stored.get("modules_to_not_convert") or stored.get("llm_int8_skip_modules") or ()
    return tuple(KeptPattern(pattern) for pattern in listed)


class AdoptWeight(ConversionOps):
    """Take over one weight: a linear layer's, or experts that the checkpoint stores fused."""

    def __init__(self, quantizer: HfQuantizer, plan: QuantizationPlan, parameter: str) -> None:
        self.hf_quantizer = quantizer  # by this attribute transformers knows to leave the tensors in their dtypes
        self.plan = plan
        self.parts = {name: part for part, name in plan.backend.stored_names(parameter, plan.options).items()}
        """The backend's name for each tensor of the checkpoint."""

    @torch.no_grad()
    def convert(  # type: ignore[override]  # called with full_layer_name and model by keyword
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Replace the tensors of one weight by its bytes, under `full_layer_name`."""
        assert model is not None
        with self.plan.noting_failures():
            return {full_layer_name: self._adopt(input_dict, full_layer_name, model)}

    def _adopt(
        self, input_dict: dict[str, Tensor | list[Tensor]], full_layer_name: str, model: PreTrainedModel
    ) -> Tensor:
        module_name, _, leaf = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        tensors = {
            key if key in self.parts else _leaf(key): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        if leaf in tensors and len(tensors) == 1 and tensors[leaf].dtype.itemsize > 1:  # kept in full precision there
            return _dense(tensors[leaf], module, leaf, self.plan, full_layer_name)
        found = {self.parts.get(name, name): tensor for name, tensor in tensors.items()}
        if experts.is_experts(module):
            own = _own(self.plan, len(next(iter(found.values()))))
            each = {index: {part: tensor[index] for part, tensor in found.items()} for index in own}
            return _stacked(each, module, leaf, self.plan, full_layer_name)
        assert isinstance(module, nn.Linear)
        weight_format = module.weight_format if isinstance(module, QuantLinear) else None
        shape = (module.out_features, module.in_features)

        def adopt() -> Tensor:
            return _adopted(found, shape, weight_format, self.plan, full_layer_name)

        if weight_format is not None:
            return _packed(adopt, module.weight, self.plan, full_layer_name)
        return _kept(adopt(), self.plan, full_layer_name)


class AdoptExperts(ConversionOps):
    """Take over experts that the checkpoint stores one by one, fusing the quantized gate and up as they are."""

    def __init__(
        self, quantizer: HfQuantizer, plan: QuantizationPlan, sources: list[str], dense: ConversionOps
    ) -> None:
        self.hf_quantizer = quantizer
        self.plan = plan
        self.sources = sources
        self.dense = dense

    @torch.no_grad()
    def convert(  # type: ignore[override]  # called with full_layer_name and model by keyword
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The bytes of all experts, shape (experts, bytes), under the target pattern."""
        assert model is not None
        module_name, _, leaf = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        if input_dict.keys() <= set(self.sources) and all(
            tensor.dtype.itemsize > 1 for tensors in input_dict.values() for tensor in tensors
        ):
            more = {"full_layer_name": full_layer_name, "model": model, **kwargs}
            made: dict[str, Any] = self.dense.convert(
                input_dict, source_patterns=self.sources, target_patterns=target_patterns, **more
            )
            (value,) = made.values()
            weight = value[0] if isinstance(value, list) else value
            return {target_patterns[0]: self._kept(weight, module.get_parameter(leaf), full_layer_name)}
        with self.plan.noting_failures():
            own = _own(self.plan, len(input_dict[self.sources[0]]))
            each = {index: self._expert(input_dict, index, full_layer_name) for index in own}
            return {target_patterns[0]: _stacked(each, module, leaf, self.plan, full_layer_name)}

    def _kept(self, weight: Tensor, parameter: Tensor, name: str) -> Tensor:
        """Experts that the checkpoint keeps in full precision: as they are, or packed because the recipe says so."""
        if weight.dtype != torch.uint8:
            return _kept(weight.to(parameter.dtype), self.plan, name)
        return _loaded(weight if self.plan.shares is None else self.plan.shares.of(weight, parameter.shape))

    def _expert(self, input_dict: dict[str, list[Tensor]], index: int, name: str) -> dict[str, Tensor]:
        """The tensors of one expert, its parts stacked."""
        parts = [
            {
                part: input_dict[key][index]
                for part, key in self.plan.backend.stored_names(source, self.plan.options).items()
                if key in input_dict
            }
            for source in self.sources
        ]
        return self._joined(parts, name)

    def _joined(self, parts: list[dict[str, Tensor]], name: str) -> dict[str, Tensor]:
        """The tensors of weights that are stacked by rows."""
        if len(parts) == 1:
            return parts[0]
        try:
            return dict(self.plan.backend.stack_rows(parts, self.plan.options))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error


def adopting_conversions(
    conversions: list[Any],
    quantizer: HfQuantizer,
    plan: QuantizationPlan,
    dense: Callable[[list[ConversionOps]], ConversionOps],
) -> list[Any]:
    """The architecture's conversions with the checkpoint's quantized tensors in place of dense ones.

    Args:
        dense: makes one operation of those on experts that the checkpoint keeps in full precision.
    """
    made = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
            leaf = targets[0].rpartition(".")[2]
            if len(targets) == 1 and leaf in experts.PROJECTIONS and stacks_rows(conversion.operations):
                names = [name for source in sources for name in _names(plan, source)]
                operations = [AdoptExperts(quantizer, plan, list(sources), dense(conversion.operations))]
                conversion = conversion.copy(names, targets, operations=operations)
        made.append(conversion)
    for name in (*experts.PROJECTIONS, "weight"):
        names = _names(plan, name)
        # a plain `down_proj` as pattern would catch the linear layer `down_proj.weight` too
        if name == "weight" or name not in names:
            made.append(WeightConverter(names, name, [AdoptWeight(quantizer, plan, name)]))
    return made


def _names(plan: QuantizationPlan, parameter: str) -> list[str]:
    """The tensors that a checkpoint may hold for a parameter, which it may also keep as it is."""
    names = list(plan.backend.stored_names(parameter, plan.options).values())
    weight = parameter.rpartition(".")[2] == "weight"
    return names if parameter in names or not weight else [*names, parameter]


def stacks_rows(operations: list[ConversionOps]) -> bool:
    """Whether operations on experts merely stack them, gate above up."""
    kinds = [type(operation) for operation in operations]
    if kinds == [MergeModulelist]:
        return True
    return kinds == [MergeModulelist, Concatenate] and operations[1].dim == 1  # type: ignore[attr-defined]  # the second is a Concatenate


def _own(plan: QuantizationPlan, count: int) -> range:
    """Which of `count` experts this rank keeps."""
    return range(count) if plan.shares is None else plan.shares.own(count)


def _stacked(
    each: dict[int, dict[str, Tensor]], module: nn.Module, leaf: str, plan: QuantizationPlan, name: str
) -> Tensor:
    """The experts that this rank keeps, by index, as a parameter."""
    weight_format = experts.weight_formats(module).get(leaf)
    parameter = module.get_parameter(leaf)
    if weight_format is not None:
        shape = weight_format.layout.shape
    else:
        shape = experts.expert_shape(module, parameter)
    weights = [_adopted(one, shape, weight_format, plan, f"{name}[{index}]") for index, one in each.items()]
    if weight_format is None:
        weights = [experts.as_rows(module, weight) for weight in weights]
    if plan.shares is None:
        return _loaded(torch.stack(weights))
    none = torch.empty(0, *parameter.shape[1:], dtype=parameter.dtype, device=plan.shares.kept_on)
    return _loaded(plan.shares.of(torch.stack(weights) if weights else none, parameter.shape))


def _adopted(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    weight_format: WeightFormat | None,
    plan: QuantizationPlan,
    name: str,
) -> Tensor:
    """The bytes of one weight, or, for a layer that the recipe skips, the weight itself."""
    if plan.shares is not None:  # the checkpoint is read into the CPU's memory
        tensors = {part: tensor.to(plan.shares.device) for part, tensor in tensors.items()}
    packed = adopt_weight(plan.backend, tensors, shape, plan.pack_dtype, plan.options, name=name)
    return plan.backend.dequantize(packed, plan.compute_dtype) if weight_format is None else packed.data


def _dense(weight: Tensor, module: nn.Module, leaf: str, plan: QuantizationPlan, name: str) -> Tensor:
    """A weight that the checkpoint keeps in full precision, packed if the recipe says so."""
    if isinstance(module, QuantLinear):
        return _packed(lambda: plan.pack(weight.to(plan.compute_dtype), name), module.weight, plan, name)
    return _kept(weight.to(module.get_parameter(leaf).dtype), plan, name)


def _packed(make: Callable[[], Tensor], parameter: Tensor, plan: QuantizationPlan, name: str) -> Tensor:
    """The bytes that `make` gives, or this rank's share of them."""
    if plan.shares is None:
        return _loaded(make())
    return _loaded(plan.shares.packed(name, parameter.numel(), make))


def _kept(weight: Tensor, plan: QuantizationPlan, name: str) -> Tensor:
    """A dense weight, or this rank's share of it."""
    if plan.shares is None or not plan.shares.covers(name, weight):
        return _loaded(weight)
    return _loaded(plan.shares.rows(weight))


def _loaded(data: Tensor) -> nn.Parameter:
    """A parameter, marked so that transformers does not draw it at random."""
    parameter = data if isinstance(data, nn.Parameter) else nn.Parameter(data, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # an attribute of transformers' own
    return parameter


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
