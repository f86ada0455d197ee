"""How much memory a process holds and held."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator

import attrs
import torch

INTERVAL_SECONDS = 0.005


@attrs.define
class Peak:
    """The most memory held inside a context, above what was held when it was entered."""

    nbytes: int = 0


@contextlib.contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak: on CUDA what torch allocates, elsewhere the process's anonymous memory, sampled.

    Memory-mapped files are left out: the system takes their pages back whenever it needs them.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield peak
        finally:
            peak.nbytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.nbytes = max(peak.nbytes, anonymous_bytes() - before)
            time.sleep(INTERVAL_SECONDS)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.nbytes = max(peak.nbytes, anonymous_bytes() - before)


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held: on CUDA what torch allocated, elsewhere what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_bytes() -> int:
    """Anonymous memory of this process; its peak resident size where the system has no /proc."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
