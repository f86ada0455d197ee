"""A packed linear layer as torch custom operators, for `torch.compile`.

A compiled graph can't hold the Python object that knows a format, and must not see the dequantized weight: it would
keep it from forward to backward. So the graph calls `packed_linear` and its backward with the bytes and the key of the
format, and each of them dequantizes, multiplies, and lets the weight go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from quantune.quantized.linear import WeightFormat

_FORMATS: dict[str, WeightFormat] = {}


def register(weight_format: WeightFormat) -> str:
    """The key under which the operators find a format: equal layouts have equal keys."""
    layout = weight_format.layout
    key = f"{layout.backend} {layout.shape} {layout.dtype} {layout.options!r}"
    _FORMATS.setdefault(key, weight_format)
    return key


@torch.library.custom_op("quantune::dequantize", mutates_args=())
def dequantize(data: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The dense weight, for what needs it as such (DoRA's norms)."""
    return _FORMATS[key].dequantize(data, dtype)


@dequantize.register_fake
def _(data: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    return data.new_empty(_FORMATS[key].layout.shape, dtype=dtype)


@torch.library.custom_op("quantune::packed_linear", mutates_args=())
def packed_linear(x: Tensor, data: Tensor, bias: Tensor | None, key: str) -> Tensor:
    """x @ W.T + bias, W dequantized from `data`."""
    return functional.linear(x, _FORMATS[key].borrow(data, x.dtype), None if bias is None else bias.to(x.dtype))


@packed_linear.register_fake
def _(x: Tensor, data: Tensor, bias: Tensor | None, key: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _FORMATS[key].layout.shape[0])


@torch.library.custom_op("quantune::packed_linear_backward", mutates_args=())
def packed_linear_backward(grad: Tensor, data: Tensor, key: str) -> Tensor:
    """grad @ W, W dequantized from `data`."""
    return grad @ _FORMATS[key].borrow(data, grad.dtype)


@packed_linear_backward.register_fake
def _(grad: Tensor, data: Tensor, key: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _FORMATS[key].layout.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, data, bias, ctx.key = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(data)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (data,) = ctx.saved_tensors
    grad_x = packed_linear_backward(grad, data, ctx.key) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, grad_bias, None


packed_linear.register_autograd(_backward, setup_context=_save)
