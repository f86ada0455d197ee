"""A run without a model: what the command does around training, and steps that count and fail as they are told.

python toy.py '{"steps": 5, "timeout": 60, "fault": {...}}': a fault has `rank`, `step` (before which it fires; absent:
before the ranks meet), `do` (a key of FAULTS) and `attempts` (the first so many fire; absent: all). With `hurry`, the
ranks watch each other so many times as fast.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from quantune.cli.console import fail_with, meaning, warning
from quantune.distributed import worker
from quantune.distributed.environment import attempt
from quantune.distributed.stopping import Phase, StopRequest
from quantune.errors import DataError, DistributedError, InterruptedRun, NonFiniteError


def data_error():
    raise DataError("row 3 has no text")


def not_finite():
    raise NonFiniteError("the loss is NaN")


def bug():
    return [][0]


FAULTS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "be asked": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "data error": data_error,
    "not finite": not_finite,
    "bug": bug,
}


def run(steps=5, timeout=60, fault=None, folder="run", seconds=0.0, hurry=1):
    with StopRequest(warning).listening() as stop:
        if not worker.enter(launches=False):
            return
        with worker.run_folder(Path(folder), "overwrite") as held:
            print("importing", file=sys.stderr, flush=True)
            import torch

            from quantune.distributed import watch
            from quantune.distributed.world import World, joined

            world = World.from_environment()
            for name in ("INTERVAL", "STALE", "GRACE"):
                setattr(watch, name, getattr(watch, name) / hurry)

            def may_fail(step=None):
                if fault and fault.get("step") == step and fault["rank"] in (world.rank, "all"):
                    if attempt() < fault.get("attempts", 99):
                        Path(f"fired-{world.rank}-{attempt()}").touch()
                        FAULTS[fault["do"]]()

            may_fail()
            with worker.watching(timeout, lambda text: fail_with(DistributedError(text))) as beat:
                stop.enter(Phase.LOADING)
                with joined(world, torch.device("cpu"), timedelta(seconds=2 * timeout + 60)):
                    world.gather(attempt())
                    stop.enter(Phase.TRAINING)
                    for step in range(1, steps + 1):
                        may_fail(step)
                        time.sleep(seconds)
                        asked = world.any(stop.asked)
                        beat(f"training, after step {step}", 1.0)
                        print(f"attempt {attempt()}, step {step}", file=sys.stderr, flush=True)
                        if asked:
                            Path(f"saved-{world.rank}").write_text(str(step))
                            raise InterruptedRun(f"stopped after step {step} and saved")
            if world.main:
                held.write_status("finished", steps)


if __name__ == "__main__":
    try:
        run(**json.loads(sys.argv[1]))
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        sys.exit(worker.end(error, lambda error: meaning(False, error)))
