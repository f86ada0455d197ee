"""One process of a run: its place among the others, where it computes, and whom it tells what it does."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch.distributed.device_mesh import DeviceMesh

from quantune.distributed.stopping import StopRequest
from quantune.distributed.watch import LOADING_PATIENCE
from quantune.distributed.world import World
from quantune.training.observer import Observer

Beat = Callable[[str, float], None]
"""Is told what a process does next, and how many timeouts it may take."""


@attrs.frozen(kw_only=True, eq=False)
class Process:
    """One process of a run."""

    world: World
    mesh: DeviceMesh | None
    """What the model is sharded over; None for a process that holds all of it."""
    device: torch.device
    observer: Observer
    beat: Beat
    """Told of progress, for the other processes."""
    stop: StopRequest

    def phase(self, text: str) -> None:
        """Say what is done before training."""
        self.observer.phase(text)
        self.beat(text, LOADING_PATIENCE)
