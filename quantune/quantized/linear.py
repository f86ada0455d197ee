"""A linear layer over packed weights, with and without a low-rank update on top.

Shape suffixes: T tokens (all leading dimensions flattened), I in features, O out features, R rank.

Forward dequantizes the weight, multiplies, and lets it go; backward dequantizes it again for the gradient of the input.
Between the two only the packed bytes live. The bytes reach autograd as a tensor argument, so that a sharded parameter
may be gathered before forward and backward and freed in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight
from quantune.quantized import ops
from quantune.quantized.workspace import Workspace

if TYPE_CHECKING:
    from quantune.quantized.rounding import Rounding


@attrs.frozen(eq=False)
class WeightFormat:
    """How to turn the bytes of one weight into the weight."""

    backend: Backend
    layout: PackedLayout
    workspace: Workspace
    key: str = attrs.field(init=False)
    """Names the format to the operators of compiled graphs."""

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "key", ops.register(self.backend, self.layout))

    def dequantize(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in a tensor of its own, shape (O, I)."""
        return self.backend.dequantize(PackedWeight(self.layout, data), dtype)

    def borrow(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, shape (O, I), valid until the next weight is borrowed."""
        return self.workspace.dequantize(self.backend, PackedWeight(self.layout, data), dtype)


class PackedLinear(torch.autograd.Function):
    """x @ W.T + bias for a frozen packed W; gradients flow to x and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, bias: Tensor | None, weight: WeightFormat) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(data)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return functional.linear(x, weight.borrow(data, x.dtype), _as(bias, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (data,) = ctx.saved_tensors
        grad_x = grad @ ctx.weight.borrow(data, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, grad_bias, None


def packed_linear(x: Tensor, data: Tensor, bias: Tensor | None, weight: WeightFormat) -> Tensor:
    """x @ W.T + bias for a frozen packed W, in eager and in compiled code."""
    if torch.compiler.is_compiling():
        return ops.packed_linear(x, data, bias, weight.key)
    return PackedLinear.apply(x, data, bias, weight)


class PackedLoraLinear(torch.autograd.Function):
    """x @ W.T + bias + scaling * (x @ A.T) @ B.T for a frozen packed W.

    One function for both paths saves x once and the rank-R product instead of the full-size update.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        data: Tensor,
        bias: Tensor | None,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        scaling: float,
        weight: WeightFormat,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = functional.linear(x_TI, weight.borrow(data, x.dtype), _as(bias, x.dtype))
        h_TR = x_TI @ lora_A_RI.to(x.dtype).T
        y_TO.addmm_(h_TR, lora_B_OR.to(x.dtype).T, alpha=scaling)
        ctx.weight, ctx.scaling, ctx.x_shape = weight, scaling, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI, h_TR, data, lora_A_RI, lora_B_OR)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, data, lora_A_RI, lora_B_OR = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_h_TR = (grad_TO @ lora_B_OR.to(grad_TO.dtype)).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = grad_TO @ ctx.weight.borrow(data, grad_TO.dtype)
            grad_x = grad_x_TI.addmm_(grad_h_TR, lora_A_RI.to(grad_TO.dtype)).view(ctx.x_shape)
        grad_bias = grad_TO.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        grad_A = (grad_h_TR.T @ x_TI).to(lora_A_RI.dtype)
        grad_B = (grad_TO.T @ h_TR).mul_(ctx.scaling).to(lora_B_OR.dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in the dtype of the activations: one that is trained is held in fp32."""
    return None if bias is None else bias.to(dtype)


class QuantLinear(nn.Linear):
    """An `nn.Linear` whose registered `weight` is the flat packed bytes, shape (nbytes,), dtype uint8.

    It is an `nn.Linear` so that whatever looks for linear layers finds it; its weight is plain bytes so that whatever
    shards, saves or loads parameters handles it, and whatever would compute with it as if it were dense fails loudly.
    """

    rounding: Rounding | None = None
    """What rounds its inputs, and an adapter's sum with its weight, in quantization-aware training."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        weight_format: WeightFormat,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialize a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.weight_format = weight_format
        self.compute_dtype = compute_dtype
        data = torch.empty(weight_format.layout.nbytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(data, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def W_q(self) -> Tensor:
        """The packed bytes, under the name by which PEFT recognizes layers that offer `dequantize()`."""
        return self.weight

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor of its own, shape (out features, in features); all ranks that share it call."""
        if torch.compiler.is_compiling():
            return ops.dequantize(self.weight, dtype or self.compute_dtype, self.weight_format.key)
        data = self.weight.data
        if isinstance(data, DTensor):
            data = data.full_tensor()
        return self.weight_format.dequantize(data, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None and self.rounding.applies(self):
            x = self.rounding.inputs(x)
        return packed_linear(x, self.weight, self.bias, self.weight_format)

    def extra_repr(self) -> str:
        layout = self.weight_format.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"backend={layout.backend}, bits_per_weight={layout.bits_per_weight:.2f}"
        )
