"""PEFT's LoRA over a weight of fused experts, registered through PEFT's custom-module dispatch."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as DenseParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quantune.quantized import experts
from quantune.quantized.merged import lora_delta, pack_merged, with_delta


class ParamWrapper(DenseParamWrapper):
    """LoRA over one weight of a module of experts, packed or not; wrappers of one module's weights are nested.

    PEFT's own adds the update of all experts to their weight on every forward pass, which bytes can't take. Here the
    module is told of the update, and the function that computes its experts adds it where a token was sent. The
    parameters, their names and what is saved are PEFT's. The name is too: PEFT asks for it before it nests wrappers.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs: Any):
        if parameter_name not in experts.PROJECTIONS:
            raise ValueError(
                f"expected one of {', '.join(experts.PROJECTIONS)} of the fused experts as a target, found "
                f"{parameter_name or 'the module that holds them'}"
            )
        super().__init__(base_layer, adapter_name, parameter_name, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> Any:
        base = self.get_base_layer()
        weight_format = experts.weight_formats(base).get(self.parameter_name)
        if weight_format is None:
            return super()._get_in_out_features(module)
        self.num_experts, self._param_ndim = len(self.get_param()), 3
        rows, columns = weight_format.layout.shape
        return (columns, rows) if base.is_transposed else (rows, columns)  # in the order of a dense one's dimensions

    @torch.compiler.disable  # as the function that computes the experts
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        if base.config._experts_implementation != experts.IMPLEMENTATION:
            raise RuntimeError(
                f'an adapter on experts needs experts_implementation = "{experts.IMPLEMENTATION}", found '
                f'"{base.config._experts_implementation}"'
            )
        active = [name for name in self.active_adapters if name in self.lora_A]
        with experts.updated(base, self.parameter_name, tuple(map(self.update_of, active))):
            return self.base_layer(x, *args, **kwargs)

    def update_of(self, adapter: str) -> experts.ExpertsUpdate:
        """The update of every expert that one adapter makes."""
        lora_A: Any = self.lora_A[adapter].weight
        lora_B: Any = self.lora_B[adapter].weight
        lora_A_ERI = lora_A.view(self.num_experts, -1, lora_A.shape[1])
        lora_B_EOR = lora_B.view(len(lora_B), -1, self.num_experts).permute(2, 0, 1).contiguous()
        # unbound at once: the gradient of each taken alone would be as large as all of them
        return experts.ExpertsUpdate(
            lora_A=lora_A_ERI.unbind(), lora_B=lora_B_EOR.unbind(), scaling=self.scaling[adapter]
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weight; a packed one is dequantized and packed again, expert by expert."""
        base = self.get_base_layer()
        weight_format = experts.weight_formats(base).get(self.parameter_name)
        if weight_format is None:
            super().merge(safe_merge, adapter_names)
            return
        data = self.get_param().data
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.lora_A:
                continue
            update = self.update_of(adapter)
            for expert in range(self.num_experts):
                weight = weight_format.dequantize(data[expert], torch.float32)
                merged = with_delta(weight, lora_delta(update.lora_A[expert], update.lora_B[expert], update.scaling))
                data[expert] = pack_merged(weight_format.backend, merged, weight_format.layout).data
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Undo a merge into a weight in full precision.

        Raises:
            RuntimeError: the weight is packed; packing rounds, so the one from before can't be computed back.
        """
        if self.merged and self.parameter_name in experts.weight_formats(self.get_base_layer()):
            raise RuntimeError("a merge into packed weights can't be undone, packing rounds; load the base again")
        super().unmerge()
