"""The mxfp4 backend: OCP microscaling 4-bit floats, as gpt-oss ships them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from quantune.backends.description import BackendDescription, Probe

if TYPE_CHECKING:
    from quantune.backends.backend import Backend


@attrs.frozen(kw_only=True)
class Mxfp4Options:
    """Options of the mxfp4 backend: the format leaves none."""

    def checkpoint_problem(self, quantization_config: Mapping[str, Any]) -> str | None:
        """What of a checkpoint's own quantization does not fit: nothing, the format has no parameters."""
        return None


def _load() -> Backend:
    from quantune.backends.mxfp4.formats import Mxfp4Backend

    return Mxfp4Backend()


description = BackendDescription(
    name="mxfp4",
    summary="OCP microscaling: 4-bit floats (E2M1), a power of two as scale per 32; gpt-oss' format",
    weight_dtypes=(),
    adopts=("mxfp4",),
    bits_per_weight={"mxfp4": 4.25},
    options=Mxfp4Options,
    probe=lambda: Probe(available=True, devices=("cpu", "cuda")),
    load=_load,
)
