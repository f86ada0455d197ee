"""A packed linear layer as torch custom operators, for `torch.compile`.

A compiled graph can't hold the Python object that knows a format, and must not see the dequantized weight: it would
keep it from forward to backward. So the graph calls `packed_linear` and its backward with the bytes and the key of the
format, and each of them dequantizes, multiplies, and lets the weight go.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight
from quantune.quantized.workspace import Workspace

_FORMATS: dict[str, tuple[Backend, PackedLayout]] = {}
_WORKSPACE = Workspace()


def register(backend: Backend, layout: PackedLayout) -> str:
    """The key under which the operators find a format: equal layouts have equal keys."""
    options: Any = layout.options
    values = attrs.asdict(options) if attrs.has(type(options)) else options  # what an attrs repr leaves out counts too
    # in words, not a number: compiled code is cached across processes with the key in it
    key = f"{layout.backend} {layout.shape} {layout.dtype} {type(options).__qualname__} {values!r}"
    _FORMATS[key] = backend, layout
    return key


def _borrow(data: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    backend, layout = _FORMATS[key]
    return _WORKSPACE.dequantize(backend, PackedWeight(layout, data), dtype)


@torch.library.custom_op("quantune::dequantize", mutates_args=())
def dequantize(data: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The dense weight, for what needs it as such (DoRA's norms)."""
    backend, layout = _FORMATS[key]
    return backend.dequantize(PackedWeight(layout, data), dtype)


@dequantize.register_fake
def _(data: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    return data.new_empty(_FORMATS[key][1].shape, dtype=dtype)


@torch.library.custom_op("quantune::packed_linear", mutates_args=())
def packed_linear(x: Tensor, data: Tensor, bias: Tensor | None, key: str) -> Tensor:
    """x @ W.T + bias, W dequantized from `data`."""
    return functional.linear(x, _borrow(data, x.dtype, key), None if bias is None else bias.to(x.dtype))


@packed_linear.register_fake
def _(x: Tensor, data: Tensor, bias: Tensor | None, key: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _FORMATS[key][1].shape[0])


@torch.library.custom_op("quantune::packed_linear_backward", mutates_args=())
def packed_linear_backward(grad: Tensor, data: Tensor, key: str) -> Tensor:
    """grad @ W, W dequantized from `data`."""
    return grad @ _borrow(data, grad.dtype, key)


@packed_linear_backward.register_fake
def _(grad: Tensor, data: Tensor, key: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _FORMATS[key][1].shape[1])


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
