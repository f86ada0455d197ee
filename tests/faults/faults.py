"""Faults in the processes of a real run: described by the test, carried by the environment, proven by a file.

A test gives `Fault`s to a run. Each process of it that a fault may be for calls `install`, which wraps quantune's own
functions in that process alone. A fault fires once in all, in whatever attempt, and leaves a file that says where.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import attrs

VARIABLE = "QUANTUNE_TEST_FAULTS"
DAY = 86400.0

Place = Literal["loading", "step", "evaluation", "saving", "publishing"]
"""Before the base is loaded; before a step; in an evaluation, after its first batch; when the files of a checkpoint or
of the adapter are written and not committed."""
Kind = Literal["kill", "stop", "hang", "error", "nan", "terminate", "interrupt", "interrupt twice", "clock", "fill"]
FILLER = "filler"


@attrs.frozen(kw_only=True)
class Fault:
    """Something that happens to one process of a run."""

    kind: Kind
    place: Place
    proof: Path
    """Written when it fires."""
    step: int | None = None
    """Steps that are done by then; None for any."""
    rank: int = 0
    disk: Path | None = None
    """The folder whose disk `fill` fills, with a file in it."""

    def fired(self) -> bool:
        """Whether it has happened."""
        return self.proof.exists()


def environment(faults: Iterable[Fault]) -> dict[str, str]:
    """What the processes of a run with these faults have in their environment."""
    return {VARIABLE: json.dumps([attrs.asdict(fault) for fault in faults], default=str)}


def install() -> None:
    """Arm the faults for this process that the environment describes."""
    described = json.loads(os.environ.get(VARIABLE, "[]"))
    rank = int(os.environ.get("RANK", "0"))
    armed = [_fault(entry) for entry in described if entry["rank"] == rank]
    if not armed:
        return
    import quantune.checkpoint.store as store
    import quantune.training.building as building
    import quantune.training.loop as loop
    import quantune.training.recording as recording
    import quantune.training.run as run

    def at(place: Place, step: int | None) -> list[Fault]:
        return [fault for fault in armed if fault.place == place and fault.step in (None, step) and not fault.fired()]

    def train_step(original: Callable, job: Any, step: int, **more: Any) -> Any:
        for fault in at("step", step):
            if fault.kind == "nan":
                prove(fault)
                job = attrs.evolve(job, loss=times_nan(job.loss))
            else:
                fire(fault)
        return original(job, step, **more)

    def evaluate(original: Callable, *arguments: Any, step: int, asked: Callable[[], bool], **more: Any) -> Any:
        def now_asked() -> bool:
            for fault in at("evaluation", step):
                fire(fault)
            return asked()

        return original(*arguments, step=step, asked=now_asked, **more)

    def load_model(original: Callable, *arguments: Any, **more: Any) -> Any:
        for fault in at("loading", None):
            fire(fault)
        return original(*arguments, **more)

    def committed(place: Place) -> Callable:
        def write_committed(original: Callable, parent: Path, name: str, write: Callable, **more: Any) -> Any:
            def write_and_fire(folder: Path) -> None:
                write(folder)
                for fault in at(place, int(name.split("-")[1]) if place == "saving" else None):
                    fire(fault)

            return original(parent, name, write_and_fire, **more)

        return write_committed

    wrap(loop, "train_step", train_step)
    wrap(recording, "evaluate", evaluate)
    wrap(building, "load_model", load_model)
    wrap(run, "write_committed", committed("publishing"))
    wrap(store, "write_committed", committed("saving"))


def _fault(entry: dict[str, Any]) -> Fault:
    paths = {key: Path(entry[key]) for key in ("proof", "disk") if entry[key] is not None}
    return Fault(**{**entry, **paths})


def wrap(module: ModuleType, name: str, wrapper: Callable) -> None:
    """Put `wrapper`, which is given the original, in its place; a name that is gone is an error, not a fault less."""
    setattr(module, name, functools.partial(wrapper, getattr(module, name)))


def fire(fault: Fault) -> None:
    """Do it."""
    prove(fault)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "hang":
        time.sleep(10**6)
    elif fault.kind == "error":
        raise RuntimeError(f"injected on rank {fault.rank}")
    elif fault.kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif fault.kind == "interrupt twice":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # in another thread than the main one, both would come as one
        os.kill(os.getpid(), signal.SIGINT)
    elif fault.kind == "clock":
        leap()
    elif fault.kind == "fill" and fault.disk is not None:
        fill(fault.disk / FILLER)
    else:
        raise AssertionError(f"{fault.kind} can't happen at {fault.place}")


def prove(fault: Fault) -> None:
    """Write where the fault fired, once."""
    with fault.proof.open("x") as file:
        file.write(f"rank {os.environ.get('RANK', '0')}, process {os.getpid()}")
        file.flush()
        os.fsync(file.fileno())


def fill(filler: Path) -> None:
    """Leave no room on a disk."""
    with filler.open("wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def leap() -> None:
    """Let the clock jump a day ahead and, at the next look, a day back, and so on."""
    true, looks = time.time, [0]

    def wrong() -> float:
        looks[0] += 1
        return true() + (DAY if looks[0] % 2 else -DAY)

    time.time = wrong


def times_nan(loss: Callable) -> Callable:
    """A loss that is not a number, and neither are its gradients."""
    return lambda *arguments: loss(*arguments) * math.nan
