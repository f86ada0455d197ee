"""The fp8 backend: e4m3 with one scale per 128 x 128 block, as DeepSeek ships it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from quantune.backends.description import BackendDescription, Probe

if TYPE_CHECKING:
    from quantune.backends.backend import Backend


@attrs.frozen(kw_only=True)
class Fp8Options:
    """Options of the fp8 backend."""

    block_size: tuple[int, ...] = (128, 128)
    """Rows and columns of the blocks that share one scale; blocks at the edges may be smaller."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong across the values: pairs of key and message."""
        if len(self.block_size) != 2 or any(size < 1 for size in self.block_size):
            yield "block_size", f"expected two numbers greater than 0, found {list(self.block_size)}"

    def activations_when_read(self) -> str:
        """What transformers does to the inputs of a layer of this format."""
        return "on a GPU transformers' fp8 layers always round activations to fp8"

    def checkpoint_problem(self, quantization_config: Mapping[str, Any]) -> str | None:
        """What of a checkpoint's own quantization does not fit: blocks of another size, or none."""
        stored = quantization_config.get("weight_block_size")
        if stored is None:
            return "it has one scale per weight, where fp8 has one per block"
        if list(stored) != list(self.block_size):
            return f"it has blocks of {list(stored)}, where the recipe has block_size = {list(self.block_size)}"
        return None

    @classmethod
    def of_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Fp8Options:
        """The options that a checkpoint was quantized with."""
        stored = quantization_config.get("weight_block_size")
        return cls() if stored is None else cls(block_size=tuple(stored))


def _load() -> Backend:
    from quantune.backends.fp8.formats import Fp8Backend

    return Fp8Backend()


description = BackendDescription(
    name="fp8",
    summary="8-bit floats (e4m3), a scale per 128 x 128 block; DeepSeek's format",
    weight_dtypes=(),
    adopts=("fp8",),
    bits_per_weight={"fp8": 8.002},
    options=Fp8Options,
    probe=lambda: Probe(available=True, devices=("cpu", "cuda")),
    load=_load,
)
