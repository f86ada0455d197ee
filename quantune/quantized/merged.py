"""What base and adapter come to: the weight that a merge writes, and the one that rounded training computes with.

Both call these functions, so that a packed merge writes the very bytes that were trained with.

Shape suffixes: O out features, I in features, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from quantune.backends.backend import Backend, pack_finite
from quantune.backends.kernels import is_finite
from quantune.backends.layout import PackedLayout, PackedWeight
from quantune.errors import NonFiniteError


def lora_delta(lora_A_RI: Tensor, lora_B_OR: Tensor, scaling: float) -> Tensor:
    """The update of LoRA in the dtype of its factors, shape (O, I), rounded as PEFT rounds it.

    Never in TF32: a run may allow that, what reads its adapter does not, and both must get the same bits.
    """
    with _in_full():
        return (lora_B_OR @ lora_A_RI).mul_(scaling)


def with_delta(weight: Tensor, delta: Tensor, magnitude_O: Tensor | None = None) -> Tensor:
    """The weight with its update, fp32 (O, I); with the magnitudes of DoRA each row is scaled to its own.

    Args:
        weight: (O, I) of any float dtype, what the base computes with.
        delta: (O, I).
    """
    merged = weight.float() + delta.float()
    if magnitude_O is None:
        return merged
    return (magnitude_O.float() / torch.linalg.norm(merged, dim=1))[:, None] * merged


def pack_merged(backend: Backend, merged: Tensor, layout: PackedLayout, *, name: str = "weight") -> PackedWeight:
    """Pack a merged weight, (O, I), as `layout` says, from the dtype that the base's weight was packed from.

    Raises:
        NonFiniteError: it holds NaN or infinity.
        QuantizationError: the format can't store these values.
    """
    merged = merged.to(layout.dtype)
    if not is_finite(merged):
        raise NonFiniteError(
            f"{name}: expected numbers to pack, found NaN or infinity in the sum of base and adapter; "
            "lower [training] learning_rate"
        )
    return pack_finite(backend, merged, layout.options, name=name)


@contextlib.contextmanager
def _in_full() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 while the context is open."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
