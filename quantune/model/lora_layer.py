"""PEFT's LoRA layer over a `QuantLinear`, registered through PEFT's custom-module dispatch."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from quantune.backends.backend import pack_weight
from quantune.quantized.linear import PackedLoraLinear, QuantLinear, WeightFormat
from quantune.quantized.merged import lora_delta, pack_merged, with_delta
from quantune.quantized.rounding import RoundedLoraLinear, Rounding


class QuantuneBackend(QuantizationBackend):
    """Gives PEFT the dense weight of a `QuantLinear`, and packs a changed one again."""

    layer_type = "linear"
    supports_merge = True
    backend_name = "quantune"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        assert isinstance(base_layer, QuantLinear)
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        weight_format = base.weight_format
        packed = pack_weight(weight_format.backend, weight_data, weight_format.layout.options)
        base.weight.data = packed.data


class RoundedLora(LoraLinear):
    """LoRA whose sum with the base's weight is rounded to a format, where `round_to` said so."""

    rounding: Rounding | None = None
    """Says whether it rounds now; None where it never does."""
    rounds_to: WeightFormat | None = None
    """The format, where there is a `rounding`."""

    def round_to(self, weight_format: WeightFormat, rounding: Rounding) -> None:
        """Compute with base and adapter as `weight_format` rounds them, while `rounding` applies."""
        self.rounds_to, self.rounding = weight_format, rounding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rounding = self.rounding
        if rounding is None or not rounding.applies(self) or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(active) != 1 or self.lora_bias[active[0]]:
            raise RuntimeError(f"expected one adapter to round with its base, found {active} and {[*args, *kwargs]}")
        base, name = self.get_base_layer(), active[0]
        magnitude = self.lora_magnitude_vector[name].weight if name in self.lora_magnitude_vector else None
        return RoundedLoraLinear.apply(
            rounding.inputs(x),
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            magnitude,
            self.scaling[name],
            self.rounds_to,
        )


class QuantLoraLinear(RoundedLora):
    """LoRA over packed weights.

    A single plain LoRA adapter takes the fused path; whatever else PEFT offers (several adapters, DoRA, mixed batches,
    dropout in training) runs through PEFT's own forward over `QuantLinear`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantization_backend = QuantuneBackend()  # PEFT's variants look for this attribute

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fusable_adapter(args, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        return PackedLoraLinear.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            base.weight_format,
        )

    def _fusable_adapter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or kwargs or self.disable_adapters or self.merged or torch.compiler.is_compiling():
            return None
        if self.rounding is not None and self.rounding.applies(self):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        drops = self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity)
        return None if drops else active[0]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the packed weight as a packed merge does: dequantize, add in fp32, pack again."""
        base: Any = self.get_base_layer()
        weight_format: WeightFormat = base.weight_format
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.lora_A:
                continue
            weight = base.dequantize(torch.float32)
            magnitude: Any = None
            if adapter in self.lora_magnitude_vector:
                magnitude = self.lora_magnitude_vector[adapter].weight
            if adapter in self.lora_variant and (magnitude is None or self.merged_adapters):
                merged = self.lora_variant[adapter].merge_safe(self, adapter, weight)
            else:
                lora_A: Any = self.lora_A[adapter].weight
                lora_B: Any = self.lora_B[adapter].weight
                merged = with_delta(weight, lora_delta(lora_A, lora_B, self.scaling[adapter]), magnitude)
            base.weight.data = pack_merged(weight_format.backend, merged, weight_format.layout).data
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Refused: packing rounds, so the weight from before a merge can't be computed back.

        Raises:
            RuntimeError: always, when something is merged.
        """
        if self.merged:
            raise RuntimeError("a merge into packed weights can't be undone, packing rounds; load the base again")
