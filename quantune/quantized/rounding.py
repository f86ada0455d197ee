"""Computing with weights as a format will round them: quantization-aware training.

Shape suffixes: T tokens (all leading dimensions flattened), I in features, O out features, R rank.

Forward packs what is trained, dequantizes it, and multiplies with that. Backward takes rounding for the identity (the
straight-through estimator, arXiv:1308.3432): the weight gets the gradient of the rounded weight, the input that of the
product with the rounded weight. Between the two only packed bytes live.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from quantune.backends.layout import PackedWeight
from quantune.quantized.linear import WeightFormat
from quantune.quantized.merged import lora_delta, pack_merged, with_delta


@attrs.define(kw_only=True, eq=False)
class Rounding:
    """What all layers of a model that rounds have in common."""

    activation_dtype: Literal["int8", "fp8"] | None = None
    """What the inputs of packed layers are rounded to, each token with a scale of its own; None leaves them."""
    begun: bool = True
    """Whether training steps round; evaluation always does, for what is deployed is rounded."""

    def applies(self, module: nn.Module) -> bool:
        """Whether `module` computes with rounded numbers now."""
        return self.begun or not module.training

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs of a layer, (..., I), as its reader rounds them; gradients pass straight through."""
        return x if self.activation_dtype is None else RoundedActivations.apply(x, self.activation_dtype)


class RoundedActivations(torch.autograd.Function):
    """Each token rounded to 8 bits with a scale of its own, symmetric, as torchao's dynamic activations are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: str) -> Tensor:
        # torchao rounds a token as it rounds a row of a weight
        from quantune.backends.torchao import TorchaoOptions
        from quantune.backends.torchao.formats import TorchaoBackend

        backend, options = TorchaoBackend(), TorchaoOptions(weight_dtype=dtype)  # type: ignore[arg-type]  # one of its
        x_TI = x.reshape(-1, x.shape[-1]).contiguous()
        layout = backend.layout((x_TI.shape[0], x_TI.shape[1]), x.dtype, options)
        packed = PackedWeight(layout, layout.write(backend.pack(x_TI, options)))
        return backend.dequantize(packed, x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class RoundedLinear(torch.autograd.Function):
    """x @ Q.T + bias, where Q is the trained weight as its format rounds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, weight_format: WeightFormat) -> Tensor:
        data = pack_merged(weight_format.backend, weight_OI, weight_format.layout).data
        x_TI = x.reshape(-1, x.shape[-1])
        ctx.weight_format, ctx.x_shape, ctx.weight_dtype = weight_format, x.shape, weight_OI.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI, data)
        y_TO = functional.linear(x_TI, weight_format.borrow(data, x.dtype), None if bias is None else bias.to(x.dtype))
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, data = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ ctx.weight_format.borrow(data, grad_TO.dtype)).view(ctx.x_shape)
        grad_weight = (grad_TO.T @ x_TI).to(ctx.weight_dtype)
        grad_bias = grad_TO.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


class RoundedLoraLinear(torch.autograd.Function):
    """x @ Q.T + bias, where Q is W + scaling * B A as its format rounds it, with DoRA's magnitudes if there are any.

    W is frozen: packed bytes in that format, or a dense weight (O, I). The gradients of A, B and the magnitudes are
    those of LoRA and DoRA, whose row norms count as constants; no gradient of the weight's size is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        bias: Tensor | None,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        magnitude_O: Tensor | None,
        scaling: float,
        weight_format: WeightFormat,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        merged = with_delta(_dense(base, weight_format), lora_delta(lora_A_RI, lora_B_OR, scaling), magnitude_O)
        data = pack_merged(weight_format.backend, merged, weight_format.layout).data
        ctx.weight_format, ctx.scaling, ctx.x_shape = weight_format, scaling, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI, base, data, lora_A_RI, lora_B_OR, magnitude_O)
        y_TO = functional.linear(x_TI, weight_format.borrow(data, x.dtype), None if bias is None else bias.to(x.dtype))
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, base, data, lora_A_RI, lora_B_OR, magnitude_O = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ ctx.weight_format.borrow(data, grad_TO.dtype)).view(ctx.x_shape)
        grad_bias = grad_TO.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        grad_magnitude = None
        if magnitude_O is not None:
            merged = with_delta(_dense(base, ctx.weight_format), lora_delta(lora_A_RI, lora_B_OR, ctx.scaling))
            norm_O = torch.linalg.norm(merged, dim=1)
            grad_magnitude = (grad_TO * (x_TI @ merged.to(x_TI.dtype).T)).sum(0, dtype=magnitude_O.dtype) / norm_O
            grad_TO = grad_TO * (magnitude_O / norm_O).to(grad_TO.dtype)
        grad_h_TR = (grad_TO @ lora_B_OR.to(grad_TO.dtype)).mul_(ctx.scaling)
        grad_A = (grad_h_TR.T @ x_TI).to(lora_A_RI.dtype)
        h_TR = x_TI @ lora_A_RI.to(x_TI.dtype).T
        grad_B = (grad_TO.T @ h_TR).mul_(ctx.scaling).to(lora_B_OR.dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, grad_magnitude, None, None


class TrainedLinear(nn.Linear):
    """A linear layer whose own weight is trained, and computes as a format rounds it."""

    def __init__(self, linear: nn.Linear, weight_format: WeightFormat, rounding: Rounding) -> None:
        """Take over the parameters of `linear`, of any float dtype."""
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialize another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_format, self.rounding = weight_format, rounding

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounding.applies(self):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, self.weight.to(x.dtype), bias)
        return RoundedLinear.apply(self.rounding.inputs(x), self.weight, self.bias, self.weight_format)


def _dense(base: Tensor, weight_format: WeightFormat) -> Tensor:
    """The frozen weight of a layer in fp32, (O, I), packed or not."""
    return weight_format.dequantize(base, torch.float32) if base.dtype == torch.uint8 else base.float()
