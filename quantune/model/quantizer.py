"""Packing weights while transformers loads them, through its public quantizer hooks.

transformers builds the model on the meta device and hands it over; every linear layer that the plan covers is replaced
by a `QuantLinear`, and every fused stack of experts by bytes of the same name. Then each tensor of the checkpoint is
read, renamed or fused as the architecture needs, and handed over alone: it is packed and let go before the next one is
read. Experts that a checkpoint stores one by one are packed one by one, before they are fused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantune.backends.backend import Backend, pack_weight
from quantune.distributed.shares import Shares
from quantune.errors import ModelError, QuantizationError
from quantune.model.adoption import adopting_conversions
from quantune.model.initialization import Initialization
from quantune.model.names import matches_any
from quantune.quantized import experts
from quantune.quantized.linear import QuantLinear, WeightFormat
from quantune.quantized.workspace import Workspace

ROUTERS = ("gate", "router")


@attrs.frozen(kw_only=True, eq=False)
class QuantizationPlan:
    """What to pack, with what, and where to dequantize it."""

    backend: Backend
    options: Any
    skip: tuple[str, ...]
    experts: bool = True
    """Pack fused experts as well."""
    compute_dtype: torch.dtype
    pack_dtype: torch.dtype
    """What weights are packed from: some formats compute in the dtype of the weight."""
    adopt: bool = False
    """The checkpoint is already in the backend's format: take it over."""
    initialization: Initialization | None = None
    """Takes the adapter's share out of the weights before they are packed."""
    shares: Shares | None = None
    """What this rank keeps of each weight; None for a process that keeps all."""
    workspace: Workspace = attrs.field(factory=Workspace)
    failures: list[Exception] = attrs.field(factory=list)
    """What went wrong with single weights, in order; transformers reports an operation's error only as text."""

    def weight_format(self, shape: tuple[int, int]) -> WeightFormat:
        """The format of a weight.

        Raises:
            QuantizationError: the backend can't store this shape.
        """
        return WeightFormat(self.backend, self.backend.layout(shape, self.pack_dtype, self.options), self.workspace)

    def pack(self, weight: Tensor, name: str) -> Tensor:
        """The bytes of one weight, shape (out features, in features), less the adapter's share."""

        def round_trip(weight: Tensor) -> Tensor:
            packed = pack_weight(self.backend, weight, self.options, name=name)
            return self.backend.dequantize(packed, torch.float32)

        weight = weight.to(self.shares.device if self.shares else weight.device, self.pack_dtype)
        if self.initialization is not None:
            weight = self.initialization.split(name.removesuffix(".weight"), weight, round_trip)
        return pack_weight(self.backend, weight, self.options, name=name).data

    @contextlib.contextmanager
    def noting_failures(self) -> Iterator[None]:
        """Remember what goes wrong in the context, whatever it is: a plugin's own code runs there too."""
        try:
            yield
        except Exception as error:
            self.failures.append(error)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationPlan:
        return self  # transformers copies configurations; the plan and its workspace are shared by the whole model


@register_quantization_config("quantune")
class QuantuneConfig(QuantizationConfigMixin):
    """Carries what to pack and what to share into `from_pretrained`; one of the two may be None."""

    def __init__(
        self,
        plan: QuantizationPlan | None,
        shares: Shares | None = None,
        initialization: Initialization | None = None,
    ) -> None:
        self.quant_method: str = "quantune"  # type: ignore[assignment]  # the base class lists its own methods
        self.plan = plan
        self.shares = shares
        self.initialization = initialization

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` would say."""
        if self.plan is None:
            return {"quant_method": self.quant_method}
        options = attrs.asdict(self.plan.options)
        return {"quant_method": self.quant_method, "backend": self.plan.backend.name, "skip": self.plan.skip, **options}

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantuneConfig:
        return self  # transformers copies configurations; a process group can't be


class StoreWeight(ConversionOps):
    """The last operation on a tensor that is being loaded: pack it, or take this rank's share of it, or both."""

    def __init__(self, config: QuantuneConfig) -> None:
        self.config = config

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
        """Replace the one tensor in `input_dict` by what the model is to hold, under `full_layer_name`."""
        assert model is not None
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        if not is_packed(model, full_layer_name):
            return {full_layer_name: _loaded(self._share(weight, full_layer_name, model))}
        assert self.config.plan is not None
        with self.config.plan.noting_failures():
            return {full_layer_name: _loaded(self._pack(self.config.plan, weight, full_layer_name, model))}

    def _share(self, weight: Tensor, name: str, model: PreTrainedModel) -> nn.Parameter:
        shares, initialization = self.config.shares, self.config.initialization
        assert shares is not None
        expected = model.get_parameter(name).shape
        if weight.shape != expected:  # transformers leaves it to whoever stores the tensor
            raise ModelError(f"{name}: expected the shape {tuple(expected)}, found {tuple(weight.shape)}")
        if initialization is not None:  # every rank splits it: singular vectors are the same on all of them
            weight = initialization.split(name.removesuffix(".weight"), weight.to(shares.device), None)
        return shares.rows(weight)

    def _pack(self, plan: QuantizationPlan, weight: Tensor, name: str, model: PreTrainedModel) -> nn.Parameter:
        shares = self.config.shares
        shape = model.get_parameter(name).shape
        if weight.dtype == torch.uint8:
            data = weight  # this rank's experts, that `PackExperts` packed
        elif weight.dim() == 3:
            module = model.get_submodule(name.rpartition(".")[0])
            own = range(len(weight)) if shares is None else shares.own(len(weight))
            packed = [plan.pack(experts.as_rows(module, weight[index]), f"{name}[{index}]") for index in own]
            data = stacked(packed, shape, weight.device)
        elif shares is not None:
            return shares.packed(name, shape.numel(), lambda: plan.pack(weight, name))
        else:
            data = plan.pack(weight, name)
        return nn.Parameter(data, requires_grad=False) if shares is None else shares.of(data, shape)


class PackExperts(ConversionOps):
    """Fuse and pack one expert after the other, where the checkpoint stores them apart.

    The architecture's own operations run on one expert at a time, so its weights are never fused in full precision.
    """

    def __init__(self, plan: QuantizationPlan, operations: list[ConversionOps]) -> None:
        self.plan = plan
        self.operations = operations

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
        more = {"full_layer_name": full_layer_name, "model": model, **kwargs}
        module_name, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        counts = {len(tensors) for tensors in input_dict.values()}
        if name not in experts.weight_formats(module) or len(counts) != 1:  # skipped, or damaged: as transformers does
            return self._fuse(dict(input_dict), source_patterns, target_patterns, more)
        packed = []
        device = next(iter(input_dict.values()))[0].device
        count = counts.pop()
        own = range(count) if self.plan.shares is None else self.plan.shares.own(count)
        for index in range(count):
            one = {pattern: [tensors[index]] for pattern, tensors in input_dict.items()}
            for tensors in input_dict.values():
                tensors[index] = None  # type: ignore[call-overload]  # let go of each expert once it is packed
            if index not in own:
                continue
            (fused,) = self._fuse(one, source_patterns, target_patterns, more).values()
            fused = fused[0] if isinstance(fused, list) else fused
            with self.plan.noting_failures():
                packed.append(self.plan.pack(experts.as_rows(module, fused[0]), f"{full_layer_name}[{index}]"))
        return {target_patterns[0]: stacked(packed, model.get_parameter(full_layer_name).shape, device)}

    def _fuse(
        self, tensors: dict[str, Any], source_patterns: list[str], target_patterns: list[str], more: dict[str, Any]
    ) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(
                tensors, source_patterns=source_patterns, target_patterns=target_patterns, **more
            )
        return tensors


@register_quantizer("quantune")
class QuantuneQuantizer(HfQuantizer):
    """transformers' view of quantune."""

    quantization_config: QuantuneConfig

    def __init__(self, quantization_config: QuantuneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        plan = quantization_config.plan
        self.pre_quantized = plan is not None and plan.adopt

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        plan = self.quantization_config.plan
        if plan is None:
            return model
        problem = shape_problem(model, plan)
        if problem is not None:
            raise QuantizationError(problem)
        for name in quantizable(model, plan.skip):
            _replace_linear(model, name, plan)
        stacks = list(quantizable_experts(model, plan.skip, plan.experts))
        for module, name, _ in stacks:
            shape = experts.expert_shape(module, experts.projections(module)[name])
            parameter = experts.set_packed(module, name, plan.weight_format(shape))
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # an attribute of transformers' own
        if stacks:
            model.set_experts_implementation(experts.IMPLEMENTATION)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if is_packed(model, param_name):
            return True
        shares = self.quantization_config.shares
        parameters = dict(model.get_submodule(param_name.rpartition(".")[0]).named_parameters(recurse=False))
        parameter = parameters.get(param_name.rpartition(".")[2])  # None for a buffer
        return shares is not None and parameter is not None and shares.covers(param_name, parameter)

    def get_quantize_ops(self) -> ConversionOps:
        return StoreWeight(self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        plan = self.quantization_config.plan
        if plan is None:
            return weight_conversions
        if plan.adopt:
            return adopting_conversions(
                weight_conversions, self, plan, lambda operations: PackExperts(plan, operations)
            )
        return [_packing_experts(conversion, plan) for conversion in weight_conversions]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def is_packed(model: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` holds packed bytes."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    return (leaf == "weight" and isinstance(module, QuantLinear)) or leaf in experts.weight_formats(module)


def stacked(packed: list[Tensor], shape: torch.Size, device: torch.device) -> Tensor:
    """Packed experts side by side, (experts, bytes); a rank may have none of those of `shape`."""
    return torch.stack(packed) if packed else torch.empty(0, *shape[1:], dtype=torch.uint8, device=device)


def _loaded(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, marked so that transformers does not draw it at random."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # an attribute of transformers' own
    return parameter


def is_router(name: str) -> bool:
    """Whether a module decides which experts a token goes to: small, and other experts are another model."""
    return name.rpartition(".")[2] in ROUTERS


def quantizable(model: PreTrainedModel, skip: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that a plan with `skip` covers.

    Kept in full precision are, besides `skip`: the output head, routers, whatever shares its weight with the embedding,
    and what the architecture itself keeps in fp32.
    """
    keep = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not is_router(name)
        and should_convert_module(name, sorted(keep))
        and not matches_any(name, skip)
    ]


def quantizable_experts(
    model: PreTrainedModel, skip: tuple[str, ...], wanted: bool = True
) -> Iterator[tuple[nn.Module, str, str]]:
    """The weights of fused experts that a plan with `skip` covers: module, name in it, full name; if `wanted`."""
    for module_name, module in model.named_modules():
        if not (wanted and experts.is_experts(module)):
            continue
        for name, weight in experts.projections(module).items():
            full_name = f"{module_name}.{name}"
            if weight.dim() == 3 and weight.is_floating_point() and not matches_any(full_name, skip):
                yield module, name, full_name


def packable(model: PreTrainedModel, skip: tuple[str, ...], experts: bool = True) -> set[str]:
    """Names of all that a plan packs: linear layers, and weights of fused experts."""
    return {*quantizable(model, skip), *(name for _, _, name in quantizable_experts(model, skip, experts))}


def _replace_linear(model: PreTrainedModel, name: str, plan: QuantizationPlan) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    shape = (linear.out_features, linear.in_features)
    quantized = QuantLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        weight_format=plan.weight_format(shape),
        compute_dtype=plan.compute_dtype,
        device="meta",
    )
    for initialized in (quantized, quantized.weight):  # or transformers draws missing weights at random
        initialized._is_hf_initialized = True  # type: ignore[union-attr]  # an attribute of transformers' own
    model.set_submodule(name, quantized)


def _packing_experts(conversion: Any, plan: QuantizationPlan) -> Any:
    """The conversion, packing experts one by one if it fuses those of a checkpoint that stores them apart."""
    if not isinstance(conversion, WeightConverter) or isinstance(conversion.operations[0], PackExperts):
        return conversion
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    leaf = targets[0].rpartition(".")[2]
    if len(targets) != 1 or leaf not in experts.PROJECTIONS or not all("*" in source for source in sources):
        return conversion
    return conversion.copy(sources, targets, operations=[PackExperts(plan, conversion.operations)])


def shape_problem(model: PreTrainedModel, plan: QuantizationPlan) -> str | None:
    """A sentence on all weights that the backend can't store; None where it stores all that the plan covers."""
    shapes: dict[str, tuple[int, int]] = {}
    for name in quantizable(model, plan.skip):
        rows, columns = model.get_parameter(f"{name}.weight").shape
        shapes[name] = (rows, columns)
    for module, name, full_name in quantizable_experts(model, plan.skip, plan.experts):
        shapes[full_name] = experts.expert_shape(module, experts.projections(module)[name])
    by_reason: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        try:
            plan.weight_format(shape)
        except QuantizationError as error:
            by_reason.setdefault(str(error), []).append(name)
    if not by_reason:
        return None
    lines = [
        names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "") + f": {reason}"
        for reason, names in by_reason.items()
    ]
    failing = [name for names in by_reason.values() for name in names]
    leaves = sorted({name.rpartition(".")[2] for name in failing})
    return (
        f"[quantization] can't store {len(failing)} weights of this base: {'; '.join(lines)}. "
        f"Choose other options, or keep them in full precision with skip = {json.dumps(leaves)}"
    )
