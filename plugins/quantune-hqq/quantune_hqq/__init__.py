"""The hqq backend of quantune: half-quadratic quantization. Imports no torch; the tensor code is in `formats`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import attrs
from quantune.backends.description import BackendDescription, Probe

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

__version__ = "0.1.0"

GROUP_SIZE_STEP = 8
"""Groups are multiples of it, so that 8 codes of 3 bits fill 3 bytes and no byte belongs to two groups."""
SUGGESTED_GROUP_SIZES = (8, 16, 32, 64, 128, 256)


@attrs.frozen(kw_only=True)
class HqqOptions:
    """Options of the hqq backend."""

    weight_dtype: Literal["int8", "int4", "int3", "int2"] = "int4"
    """Integers of 8, 4, 3 or 2 bits."""
    group_size: int = 64
    """Weights of a row that share one scale and one zero point: a multiple of 8."""
    iterations: int = 20
    """Updates of the zero points, of which each group keeps its best. 0 rounds to nearest."""
    lp_norm: float = 0.7
    """The p of the l_p norm of the error that is minimized, above 0 and up to 1: the smaller, the less a few badly
    stored outliers count against all other weights."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong across the values: pairs of key and message."""
        if self.group_size < 1 or self.group_size % GROUP_SIZE_STEP:
            yield "group_size", f"expected a positive multiple of {GROUP_SIZE_STEP}, found {self.group_size}"
        if self.iterations < 0:
            yield "iterations", f"must not be negative, found {self.iterations}"
        if not 0 < self.lp_norm <= 1:
            yield "lp_norm", f"must be greater than 0 and at most 1, found {self.lp_norm}"

    def resolved(self) -> HqqOptions:
        """The same options with every default written out: they are all plain values already."""
        return self

    @staticmethod
    def hint(key: str, value: object) -> str | None:
        """What to write instead of a value that is refused."""
        if key == "weight_dtype" and value in (8, 4, 3, 2, "8", "4", "3", "2"):
            return f'weight_dtype = "int{value}"'
        return None


def _load() -> Backend:
    from quantune_hqq.formats import HqqBackend

    return HqqBackend()


description = BackendDescription(
    name="hqq",
    summary="half-quadratic quantization: 8 to 2 bit integers in groups, zero points fitted to heavy-tailed errors",
    weight_dtypes=("int8", "int4", "int3", "int2"),
    bits_per_weight={"int8": 8.5, "int4": 4.5, "int3": 3.5, "int2": 2.5},
    options=HqqOptions,
    probe=lambda: Probe(available=True, devices=("cpu", "cuda")),
    load=_load,
)
