"""Quantization-aware training: which layers round, to what, and how the base under them is stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from quantune.backends import registry
from quantune.backends.readers import Destination
from quantune.errors import ModelError
from quantune.model.adapter import NAME
from quantune.model.adoption import kept_modules
from quantune.model.lora_experts import ParamWrapper
from quantune.model.lora_layer import RoundedLora
from quantune.model.quantizer import packable
from quantune.model.targets import match_parameters, match_targets
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear, WeightFormat
from quantune.quantized.rounding import Rounding, TrainedLinear
from quantune.quantized.workspace import Workspace
from quantune.recipe.schema import AdapterConfig, QatConfig, QuantizationConfig


@attrs.frozen(kw_only=True)
class RoundingPlan:
    """What rounds in a run with `[training.qat]`."""

    config: QatConfig
    format: QuantizationConfig
    """What is rounded to."""
    stored: QuantizationConfig | None
    """How the base is loaded: as `format` says, but for layers whose weights must be dense; None where none is left."""
    layers: tuple[str, ...]
    """The linear layers whose trained weight is rounded, by their names before there is an adapter."""
    stacks: tuple[str, ...]
    """The weights of fused experts that are rounded with their update."""

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters that are rounded once they are trained."""
        return frozenset((*(f"{name}.weight" for name in self.layers), *self.stacks))


def plan_rounding(
    skeleton: PreTrainedModel,
    config: QatConfig | None,
    quantization: QuantizationConfig | None,
    adapter: AdapterConfig,
    stored: Mapping[str, Any] | None = None,
) -> RoundingPlan | None:
    """What `[training.qat]` rounds over a base, given without weights; None where a recipe has no such table.

    `stored` is what the `config.json` of a checkpoint that is already quantized says of that.

    Raises:
        ModelError: dense weights are needed of a quantized base, or inputs are to be rounded of experts, or of layers
            that the format's reader does not take so.
    """
    if config is None or quantization is None:
        return None
    skip = quantization.skip if stored is None else (*quantization.skip, *kept_modules(stored))
    packed = packable(skeleton, skip, quantization.experts)
    in_stacks = sorted(packed.intersection(name for name, _ in skeleton.named_parameters()))
    if config.activation_dtype is not None and in_stacks:
        raise ModelError(
            f'[training.qat] activation_dtype = "{config.activation_dtype}" rounds the inputs of linear layers, and '
            f"this base has packed experts, e.g. {in_stacks[0]}, whose readers don't; leave activation_dtype out, or "
            "keep the experts in full precision with [quantization] experts = false"
        )
    if config.activation_dtype is not None:
        _require_read(skeleton, packed, quantization, config.activation_dtype)
    layers = tuple(name for name in match_targets(skeleton, adapter) if name in packed)
    stacks = tuple(name for name in match_parameters(skeleton, adapter.target_parameters) if name in packed)
    held: QuantizationConfig | None = quantization
    if adapter.type == "full" or config.lora_base == "dense":
        if stored is not None:
            full = adapter.type == "full"
            what = '[adapter] type = "full"' if full else '[training.qat] lora_base = "dense"'
            raise ModelError(
                f"{what} begins with the original weights, and this base is already quantized; choose the "
                + ("unquantized base" if full else 'unquantized base, or lora_base = "packed"')
            )
        dense = (*quantization.skip, *layers, *stacks)
        held = attrs.evolve(quantization, skip=dense) if packable(skeleton, dense, quantization.experts) else None
    return RoundingPlan(config=config, format=quantization, stored=held, layers=layers, stacks=stacks)


def _require_read(
    skeleton: PreTrainedModel, layers: Collection[str], quantization: QuantizationConfig, activation_dtype: str
) -> None:
    """Require that the format's reader takes all packed layers with their inputs rounded: nothing else rounds them.

    Raises:
        ModelError: it does not.
    """
    backend = registry.load_backend(registry.describe_available(quantization.backend))
    reader = backend.reader(quantization.options, activation_dtype)
    for name in sorted(layers):
        weight = skeleton.get_parameter(f"{name}.weight")
        destination = Destination(
            name=f"{name}.weight",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=skeleton.dtype,
            model_type=skeleton.config.model_type,
        )
        reason = reader.refusal(destination)
        if reason is not None:
            raise ModelError(
                f'[training.qat] activation_dtype = "{activation_dtype}": {reader.library} would not take {name} of '
                f"this base: {reason}; leave activation_dtype out"
            )


def round_layers(model: PeftModel, plan: RoundingPlan, *, dtype: torch.dtype) -> Rounding:
    """Let the layers of `plan` round, from `dtype`, and their neighbours round their inputs.

    The model was loaded as `plan.stored` says, and its adapter with `rounds`. A layer that is trained in full computes
    in the dtype of its inputs from here on, not in fp32 as what `modules_to_save` names.
    """
    rounding = Rounding(activation_dtype=plan.config.activation_dtype)
    round_inputs(model, rounding)
    backend = registry.load_backend(registry.describe_available(plan.format.backend))
    workspace = Workspace()

    def weight_format(shape: tuple[int, int]) -> WeightFormat:
        return WeightFormat(backend, backend.layout(shape, dtype, plan.format.options), workspace)

    inner: nn.Module = model.get_base_model()
    for name in plan.layers:
        layer = inner.get_submodule(name)
        if isinstance(layer, ModulesToSaveWrapper):
            trained: Any = layer.modules_to_save[NAME]
            shape = (trained.out_features, trained.in_features)
            layer.modules_to_save[NAME] = TrainedLinear(trained, weight_format(shape), rounding)
        else:
            assert isinstance(layer, RoundedLora)
            base: Any = layer.get_base_layer()
            layer.round_to(weight_format((base.out_features, base.in_features)), rounding)
    for name in plan.stacks:
        path, _, leaf = name.rpartition(".")
        holder: Any = inner.get_submodule(path)
        while isinstance(holder, ParamWrapper):
            holder = holder.base_layer
        packed = experts.weight_formats(holder).get(leaf)
        found = packed or weight_format(experts.expert_shape(holder, holder.get_parameter(leaf)))
        experts.round_updated(holder, leaf, found, rounding)
    return rounding


def round_inputs(model: nn.Module, rounding: Rounding) -> None:
    """Let packed linear layers round their inputs, as `rounding` says."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.rounding = rounding
