"""Where weights are dequantized into."""

from __future__ import annotations

import torch
from torch import Tensor

from quantune.backends.backend import Backend
from quantune.backends.layout import PackedWeight


class Workspace:
    """One buffer per device and dtype that dequantized weights are written into, grown to the largest.

    On a CPU a fresh buffer for every dequantized weight costs several times the dequantizing itself (page faults).
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of `shape` whose contents are undefined; it is the caller's until the next call."""
        count = torch.Size(shape).numel()
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # or training could not write into what inference once allocated
                buffer = self._buffers[device, dtype] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)

    def dequantize(self, backend: Backend, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The weight, shape (O, I), in the buffer if the backend can; valid until the next call."""
        out = None
        if backend.fills_out(packed.layout, dtype):
            out = self.get(packed.layout.shape, dtype, packed.data.device)
        return backend.dequantize(packed, dtype, out)
