"""The tensor side of a backend: what it stores, how it packs, how it dequantizes, how it merges."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantune.backends import kernels
from quantune.backends.layout import PackedLayout, PackedWeight, TensorSpec
from quantune.errors import QuantizationError

if TYPE_CHECKING:
    from quantune.backends.readers import Reader


class Backend(abc.ABC):
    """A weight format. Subclasses are stateless: everything about one weight is in its `PackedLayout`.

    `inner_tensors`, `pack` and `dequantize` are all a format must say; fused experts are packed one by one with them.
    """

    name: str

    @abc.abstractmethod
    def inner_tensors(self, shape: tuple[int, int], options: Any) -> Mapping[str, TensorSpec]:
        """The tensors that store a weight of `shape` (out features, in features), in the order they are laid out.

        Raises:
            QuantizationError: the format can't store this shape. The message follows the weight's name and a colon:
                what does not fit, and what would.
        """

    @abc.abstractmethod
    def pack(self, weight: Tensor, options: Any) -> Mapping[str, Tensor]:
        """Quantize a finite float `weight` (out features, in features) into the tensors of `inner_tensors`.

        Raises:
            QuantizationError: the format can't store these values. The message follows the weight's name and a colon.
        """

    @abc.abstractmethod
    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight as a dense tensor of `dtype`, shape `packed.layout.shape`.

        `out`, when given, is a contiguous tensor of that dtype and shape which the result may be written into; the
        result is returned either way.
        """

    def fills_out(self, layout: PackedLayout, dtype: torch.dtype) -> bool:
        """Whether `dequantize` writes into `out`; if so, one buffer serves all weights."""
        return False

    def merge(self, packed: PackedWeight, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized weight plus `delta`, added in fp32 and rounded once to `dtype`."""
        return self.dequantize(packed, torch.float32).add_(delta.float()).to(dtype)

    def export(self, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors under the names and in the shapes that checkpoints of this format store them in."""
        return packed.views()

    def adopt(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], options: Any) -> Mapping[str, Tensor]:
        """Take over a weight that is already in this format, bit for bit: from the tensors of `export` to inner ones.

        Raises:
            QuantizationError: a tensor is missing, or is not what the format says.
        """
        return tensors

    def element_values(self, options: Any) -> tuple[float, ...] | None:
        """The value of each element code, from 0, before scales; NaN for codes that stand for no number.

        A weight is such a value times a scale of its own, plus an offset of its own. None for a format that is not so,
        or whose codes must not be chosen one by one.
        """
        return None

    def with_elements(self, packed: PackedWeight, codes: Tensor) -> Mapping[str, Tensor]:
        """The inner tensors of a packed weight with other element codes, uint8 (out features, in features).

        Raises:
            QuantizationError: the format has no codes to choose, as `element_values` says.
        """
        raise QuantizationError(f"the backend {self.name!r} does not say how the codes of its weights are stored")

    def checkpoint_names(self, parameter: str) -> Mapping[str, str]:
        """What checkpoints of this format call the tensors of `export`, for a parameter called `parameter`."""
        return {"weight": parameter}

    def stored_names(self, parameter: str, options: Any) -> Mapping[str, str]:
        """`checkpoint_names`, for a format whose options decide which tensors there are: those of `options` alone."""
        return self.checkpoint_names(parameter)

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]], options: Any) -> Mapping[str, Tensor]:
        """The tensors of `export` of weights stacked by rows, from those of each.

        Raises:
            QuantizationError: stacked, they are no weight of this format.
        """
        raise QuantizationError(f"the backend {self.name!r} does not stack weights that are already packed")

    def reader(self, options: Any, activation_dtype: str | None = None) -> Reader:
        """How another library reads checkpoints of this format, where one does.

        Args:
            activation_dtype: one of `options.activation_dtypes()`.

        Raises:
            QuantizationError: none does; the message says which format of the backend has a reader instead.
        """
        raise QuantizationError(
            f"no library reads packed checkpoints of the backend {self.name!r}; choose bnb, torchao, fp8 or mxfp4"
        )

    def layout(self, shape: tuple[int, int], dtype: torch.dtype, options: Any) -> PackedLayout:
        """The layout of a weight of `shape` and `dtype`, before there is one."""
        tensors = self.inner_tensors(shape, options)
        return PackedLayout.plan(backend=self.name, options=options, shape=shape, dtype=dtype, tensors=tensors)


def pack_weight(backend: Backend, weight: Tensor, options: Any, *, name: str = "weight") -> PackedWeight:
    """Pack one weight, shape (out features, in features), of any float dtype.

    Raises:
        QuantizationError: the weight is not a float matrix, is of a shape the format can't store, or holds NaN or
            infinity; `name` is in the message.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantizationError(
            f"{name}: expected a float matrix to pack, found {weight.dtype} with shape {tuple(weight.shape)}"
        )
    if not kernels.is_finite(weight):
        raise QuantizationError(
            f"{name}: can't be packed, it holds NaN or infinity. The checkpoint is damaged; "
            f"fetch it again, or name the module in [quantization] skip"
        )
    return pack_finite(backend, weight, options, name=name)


def pack_finite(backend: Backend, weight: Tensor, options: Any, *, name: str = "weight") -> PackedWeight:
    """`pack_weight` for a float matrix that is known to be finite: on a GPU each look at that waits for it.

    Raises:
        QuantizationError: it is of a shape or of values that the format can't store; `name` is in the message.
    """
    layout = layout_of(backend, (weight.shape[0], weight.shape[1]), weight.dtype, options, name=name)
    try:
        tensors = backend.pack(weight.contiguous(), options)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
    return PackedWeight(layout, layout.write(tensors))


def layout_of(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, options: Any, *, name: str = "weight"
) -> PackedLayout:
    """The layout of the weight called `name`.

    Raises:
        QuantizationError: the format can't store this shape; `name` is in the message.
    """
    try:
        return backend.layout(shape, dtype, options)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error


def adopt_weight(
    backend: Backend,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    options: Any,
    *,
    name: str = "weight",
) -> PackedWeight:
    """A packed weight from the tensors of a checkpoint that is already in the backend's format.

    Raises:
        QuantizationError: the tensors are not what the format says; `name` is in the message.
    """
    layout = layout_of(backend, shape, dtype, options, name=name)
    try:
        return PackedWeight(layout, layout.write(backend.adopt(tensors, shape, options)))
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error
