"""What a backend says about itself without importing torch.

A backend package exposes one `BackendDescription` through an entry point of the group `quantune.backends`:

    [project.entry-points."quantune.backends"]
    mine = "quantune_mine:description"

The module that holds the description must not import torch: listing backends and checking recipes read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

API_VERSION = 1
ENTRY_POINT_GROUP = "quantune.backends"


@attrs.frozen(kw_only=True)
class Probe:
    """Whether a backend can run here."""

    available: bool
    """True when everything it needs is installed."""
    devices: tuple[str, ...] = ()
    """Device types it runs on, e.g. `("cpu", "cuda")`."""
    devices_of: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    """Device types by weight dtype, where they are fewer than `devices`."""
    reason: str | None = None
    """Why not, when it is not available."""
    install: str | None = None
    """The command that would change that."""


@attrs.frozen(kw_only=True)
class BackendDescription:
    """A backend's name, options and entry to its tensor code."""

    name: str
    """The value of `backend` in a recipe."""
    summary: str
    """One line for `quantune backends list`."""
    weight_dtypes: tuple[str, ...]
    """The values of `weight_dtype` it accepts; none for a backend of one format without that option."""
    bits_per_weight: Mapping[str, float] = attrs.field(factory=dict)
    """What a weight takes on average, scales included, for each of `weight_dtypes` (for the backend's name where there
    are none) with default options; `quantune backends check` measures it on a weight of 4096 x 4096."""
    adopts: tuple[str, ...] = ()
    """Values of `quant_method` in a checkpoint's `config.json` whose tensors it takes over bit for bit. Its options
    then have a method `checkpoint_problem(quantization_config)`: a sentence on what does not fit, or None."""
    options: type
    """A frozen attrs class: the keys it accepts under `[quantization]`, with defaults and a docstring under each.

    Where the library that reads its checkpoints can round activations, a method `activation_dtypes()` says what these
    options let it round them to, e.g. `("int8",)`; where it does so without being asked, a method
    `activations_when_read()` says that in a sentence, or None."""
    probe: Callable[[], Probe]
    """Says whether it can run here; must not import torch."""
    load: Callable[[], Backend]
    """Imports and returns the tensor code."""
    api_version: int = API_VERSION
    """The version of this protocol the backend was written for."""


def probe_package(package: str, *, minimum: tuple[int, ...], devices: tuple[str, ...], install: str) -> Probe:
    """Probe for one installed package of at least version `minimum`, by its metadata alone."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Probe(available=False, reason=f"{package} is not installed", install=install)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[: len(minimum)] if part.isdigit())
    if numbers < minimum:
        needed = ".".join(str(part) for part in minimum)
        return Probe(available=False, reason=f"{package} {version} is older than {needed}", install=install)
    return Probe(available=True, devices=devices)
