"""A description whose module imports no torch, but whose probe does."""

from __future__ import annotations

import attrs
from quantune_tiny import TinyOptions, description

from quantune.backends.description import Probe


@attrs.frozen(kw_only=True)
class Options(TinyOptions):
    """Options of a format in this module."""


def _probe() -> Probe:
    import torch

    return Probe(available=True, devices=("cuda", "cpu") if torch.cuda.is_available() else ("cpu",))


probing_with_torch = attrs.evolve(description, options=Options, probe=_probe)
