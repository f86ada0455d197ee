"""Packing weights while transformers loads them, through its public quantizer hooks.

transformers builds the model on the meta device and hands it over; every linear layer that the plan covers is replaced
by a `QuantLinear`. Then each tensor of the checkpoint is read, renamed or fused as the architecture needs, and handed
over alone: it is packed and let go before the next one is read.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantune.backends.backend import Backend, pack_weight
from quantune.errors import QuantizationError
from quantune.model.names import matches_any
from quantune.quantized.linear import QuantLinear, WeightFormat, Workspace


@attrs.frozen(kw_only=True, eq=False)
class QuantizationPlan:
    """What to pack, with what, and where to dequantize it."""

    backend: Backend
    options: Any
    skip: tuple[str, ...]
    compute_dtype: torch.dtype
    workspace: Workspace = attrs.field(factory=Workspace)
    failures: list[QuantizationError] = attrs.field(factory=list)
    """Weights that could not be packed; transformers reports an operation's error only as text."""

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationPlan:
        return self  # transformers copies configurations; the plan and its workspace are shared by the whole model


@register_quantization_config("quantune")
class QuantuneConfig(QuantizationConfigMixin):
    """Carries a `QuantizationPlan` into `from_pretrained`."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.quant_method: str = "quantune"  # type: ignore[assignment]  # the base class lists its own methods
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` would say."""
        options = attrs.asdict(self.plan.options)
        return {"quant_method": self.quant_method, "backend": self.plan.backend.name, "skip": self.plan.skip, **options}


class PackWeight(ConversionOps):
    """The last operation on a tensor that is being loaded: pack it."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan

    @torch.no_grad()
    def convert(  # type: ignore[override]  # called with full_layer_name and model by keyword
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Replace the one tensor in `input_dict` by its flat packed bytes, under `full_layer_name`."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        try:
            packed = pack_weight(self.plan.backend, weight, self.plan.options, name=full_layer_name)
        except QuantizationError as error:
            self.plan.failures.append(error)
            raise
        parameter = nn.Parameter(packed.data, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as its module has
        return {full_layer_name: parameter}


@register_quantizer("quantune")
class QuantuneQuantizer(HfQuantizer):
    """transformers' view of quantune."""

    quantization_config: QuantuneConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        plan = self.quantization_config.plan
        for name in quantizable(model, plan.skip):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            shape = (linear.out_features, linear.in_features)
            layout = plan.backend.layout(shape, linear.weight.dtype, plan.options)
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                weight_format=WeightFormat(plan.backend, layout, plan.workspace),
                compute_dtype=plan.compute_dtype,
                device="meta",
            )
            for initialized in (quantized, quantized.weight):  # or transformers draws missing weights at random
                initialized._is_hf_initialized = True  # type: ignore[union-attr]  # an attribute of transformers' own
            model.set_submodule(name, quantized)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(module), QuantLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return PackWeight(self.quantization_config.plan)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def quantizable(model: PreTrainedModel, skip: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that a plan with `skip` covers.

    Kept in full precision are, besides `skip`: the output head, whatever shares its weight with the embedding, and what
    the architecture itself keeps in fp32.
    """
    keep = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and should_convert_module(name, sorted(keep))
        and not matches_any(name, skip)
    ]
