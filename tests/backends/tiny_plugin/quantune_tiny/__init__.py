"""The tiny backend: integers with few scales. Imports no torch; the tensor code is in `formats`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import attrs

from quantune.backends.description import BackendDescription, Probe

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

GROUP_SIZES = (16, 32, 64, 128)
DEFAULT_GROUP_SIZE = 32


@attrs.frozen(kw_only=True)
class TinyOptions:
    """Options of the tiny backend."""

    weight_dtype: Literal["int8", "int4"] = "int8"
    """8-bit integers with one scale for the whole weight, or 4-bit integers with one scale per group."""
    group_size: int | None = None
    """`int4`: weights of a row that share one scale: 16, 32 (the default), 64 or 128."""

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong across the values: pairs of key and message."""
        if self.group_size is None:
            return
        if self.weight_dtype == "int8":
            yield "group_size", 'group_size has no meaning for weight_dtype = "int8", which has one scale'
        elif self.group_size not in GROUP_SIZES:
            yield "group_size", f"expected one of {', '.join(map(str, GROUP_SIZES))}, found {self.group_size}"

    def resolved(self) -> TinyOptions:
        """The same options with every default written out."""
        if self.weight_dtype == "int8":
            return self
        return attrs.evolve(self, group_size=self.group_size or DEFAULT_GROUP_SIZE)

    @staticmethod
    def hint(key: str, value: object) -> str | None:
        """What to write instead of a value that is refused."""
        if key == "weight_dtype" and value == "nf4":
            return 'nf4 is a format of another backend: backend = "bnb"'
        return None


def _probe() -> Probe:
    return Probe(available=True, devices=("cpu", "cuda"))


def _load() -> Backend:
    from quantune_tiny.formats import TinyBackend

    return TinyBackend()


description = BackendDescription(
    name="tiny",
    summary="integers with few scales",
    weight_dtypes=("int8", "int4"),
    bits_per_weight={"int8": 8.0, "int4": 5.0},
    options=TinyOptions,
    probe=_probe,
    load=_load,
    api_version=1,
)
