"""Packed weights: a layout (what the bytes mean) and the bytes (one flat uint8 tensor).

    bytes   | codes ............ | pad | absmax ..... | pad | offset | pad |
    offsets   0                        16 * k               16 * m

Every inner tensor starts at a multiple of 16 bytes, so it is a zero-copy view of the flat tensor in its own dtype,
wherever the flat tensor came from: a checkpoint, an all-gather, a slice of a fused stack.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import attrs
import torch
from torch import Tensor

from quantune.errors import QuantizationError

ALIGNMENT = 16
"""Bytes. The strictest alignment a view of the flat tensor needs (fp32 views of unaligned bytes raise in torch)."""


@attrs.frozen
class TensorSpec:
    """Dtype and shape of a tensor that need not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen(kw_only=True)
class InnerTensor:
    """One tensor of a backend's format and where it lies in the flat bytes."""

    name: str
    spec: TensorSpec
    offset: int


@attrs.frozen(kw_only=True)
class PackedLayout:
    """What the bytes of one packed weight mean. Hashable, holds no tensor."""

    backend: str
    """Name of the backend whose format this is."""
    options: Hashable
    """The backend's options, a frozen attrs instance."""
    shape: tuple[int, int]
    """Shape of the weight: (out features, in features)."""
    dtype: torch.dtype
    """Dtype of the weight before packing."""
    inner: tuple[InnerTensor, ...]
    nbytes: int
    """Length of the flat bytes."""

    @classmethod
    def plan(
        cls,
        *,
        backend: str,
        options: Hashable,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tensors: Mapping[str, TensorSpec],
    ) -> PackedLayout:
        """Lay `tensors` out one after the other, each at an aligned offset."""
        inner, offset = [], 0
        for name, spec in tensors.items():
            inner.append(InnerTensor(name=name, spec=spec, offset=offset))
            offset = _aligned(offset + spec.nbytes)
        return cls(backend=backend, options=options, shape=shape, dtype=dtype, inner=tuple(inner), nbytes=offset)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and padding included."""
        return 8 * self.nbytes / math.prod(self.shape)

    def write(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy `tensors` into new flat bytes, shape (nbytes,), dtype uint8.

        Raises:
            QuantizationError: a tensor is missing, or has another dtype or shape than the layout says.
        """
        if tensors.keys() != {entry.name for entry in self.inner}:
            raise QuantizationError(
                f"backend {self.backend!r}: expected the inner tensors {sorted(e.name for e in self.inner)}, "
                f"found {sorted(tensors)}"
            )
        device = next(iter(tensors.values())).device
        flat = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        for name, view in self.views(flat).items():
            tensor = tensors[name]
            if tensor.dtype != view.dtype or tensor.shape != view.shape:
                raise QuantizationError(
                    f"backend {self.backend!r}: expected inner tensor {name!r} as {view.dtype} {tuple(view.shape)}, "
                    f"found {tensor.dtype} {tuple(tensor.shape)}"
                )
            view.copy_(tensor)
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The inner tensors as zero-copy views of `flat`, shape (nbytes,), dtype uint8."""
        views = {}
        for entry in self.inner:
            segment = flat[entry.offset : entry.offset + entry.spec.nbytes]
            views[entry.name] = segment.view(entry.spec.dtype).view(entry.spec.shape)
        return views


@attrs.frozen(eq=False)
class PackedWeight:
    """A layout with its bytes."""

    layout: PackedLayout
    data: Tensor
    """Shape (layout.nbytes,), dtype uint8."""

    def views(self) -> dict[str, Tensor]:
        """The inner tensors as zero-copy views."""
        return self.layout.views(self.data)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
