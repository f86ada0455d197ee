"""Trying a backend out where it can do no harm: in a process of its own, with a time limit.

    parent: check(found, timeout)  --starts-->  child: main(name, report)
            reads the report       <--a file--         writes it before and after every stage

The child says before each stage what it is about to do, so that the parent can tell where a child died or hung. The
report is JSON in a temporary file: nothing the backend prints gets in between, and nothing it wrote is executed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import attrs

from quantune.backends import registry
from quantune.backends.description import BackendDescription, Probe
from quantune.backends.discovery import in_words, plain, require_readable_packages
from quantune.backends.options import default_options
from quantune.backends.registry import FoundBackend
from quantune.errors import BackendError, QuantuneError
from quantune.recipe.structure import structure

DEFAULT_TIMEOUT = 120.0
"""Seconds; importing torch takes most of them on a slow machine."""
TRIED_SHAPE = (512, 1024)
MEASURED_SHAPE = (4096, 4096)
"""The weight that bits per weight are declared for."""
STDERR_KEPT = 4096
GRACE = 10.0
"""Seconds after the time limit at which a child ends itself, should its parent be gone."""

CHILD = "import sys; sys.path[:] = {path!r}; from quantune.backends.inspection import main; main(*sys.argv[1:])"
"""With the parent's own path: `-m` would put the current folder before it."""


@attrs.frozen(kw_only=True)
class RoundTrip:
    """One random weight, packed and dequantized."""

    weight_dtype: str
    """The backend's name where it has one format only."""
    device: str
    bits_per_weight: float
    """Of a weight of `MEASURED_SHAPE`."""
    declared: float | None = None
    """What the description says."""
    relative_error: float
    """Norm of the difference over norm of the weight, normally distributed values of `TRIED_SHAPE`."""
    pack_seconds: float
    dequantize_seconds: float


Verdict = Literal["works", "unavailable", "broken"]


@attrs.frozen(kw_only=True)
class Report:
    """What the child found out."""

    stage: str
    """What it is about to do."""
    status: Verdict | None = None
    reason: str | None = None
    install: str | None = None
    devices: tuple[str, ...] = ()
    round_trips: tuple[RoundTrip, ...] = ()


@attrs.frozen(kw_only=True)
class Checked:
    """A row of `quantune backends check`."""

    name: str
    package: str
    version: str
    status: Verdict
    """`unavailable`: sound, and something it needs is not here."""
    reason: str | None = None
    install: str | None = None
    devices: tuple[str, ...] = ()
    round_trips: tuple[RoundTrip, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """The row as JSON can hold it."""
        return attrs.asdict(self)


# The parent -----------------------------------------------------------------------------------------------------------


def check(found: FoundBackend, timeout: float = DEFAULT_TIMEOUT) -> Checked:
    """Import, probe and load a backend and pack a weight with it, in a process that may take `timeout` seconds."""
    known: dict[str, Any] = {"name": found.name, "package": found.package, "version": found.version}
    if found.problem:
        return Checked(**known, status="broken", reason=found.problem)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quantune-check-") as folder:
        path = Path(folder) / "report.json"
        ended, said = _run(found.name, path, timeout)
        report = _read(path)
    seconds = time.monotonic() - started
    report = report or Report(stage="starting")
    status, reason = report.status, report.reason
    if status is None:
        status, reason = "broken", _death(ended, report.stage, timeout, said)
    return Checked(
        **known,
        status=status,
        reason=reason,
        install=report.install,
        devices=report.devices,
        round_trips=report.round_trips,
        seconds=seconds,
    )


def _run(name: str, path: Path, timeout: float) -> tuple[int | None, str]:
    """The child's exit code (None: the time was up) and the last of what it wrote to standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(path=sys.path), name, str(path), str(timeout + GRACE)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    tail = _Tail(process.stderr)
    try:
        ended = process.wait(timeout)
    except subprocess.TimeoutExpired:
        ended = None
    finally:
        _kill(process)  # and whatever it started
    return ended, tail.text()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


class _Tail:
    """Reads a pipe to its end and keeps the last of it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._kept = b""
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                self._kept = (self._kept + chunk)[-STDERR_KEPT:]

    def text(self) -> str:
        """The last line; a process that got away may hold the pipe open, which is not waited for."""
        self._thread.join(timeout=1)
        lines = [line for line in self._kept.decode(errors="replace").splitlines() if line.strip()]
        return plain(lines[-1].strip(), 200) if lines else ""


def _read(path: Path) -> Report | None:
    """The report as far as the child got, None if there is none that can be read."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    report, _ = structure(Report, document)
    return report


def _death(ended: int | None, doing: str, timeout: float, said: str) -> str:
    """Why there is no verdict."""
    if ended is None:
        return f"did not end within {timeout:g} seconds, {doing}; --timeout gives it more"
    if ended < 0:
        try:
            how = f"killed by {signal.Signals(-ended).name}"
        except ValueError:
            how = f"killed by signal {-ended}"
    else:
        how = f"left with exit code {ended}"
    return f"crashed {doing}: {how}" + (f" ({said})" if said else "")


# The child ------------------------------------------------------------------------------------------------------------


def main(name: str, path: str, seconds: str) -> None:
    """Try the backend called `name` and write the report to `path`; ends the process, after `seconds` in any case."""
    faulthandler.dump_traceback_later(float(seconds), exit=True)

    def write(report: Report) -> None:
        document = attrs.asdict(report, filter=lambda _, value: value is not None)
        part = Path(f"{path}.part")
        part.write_text(json.dumps(document), encoding="utf-8")
        part.replace(path)

    for report in try_out(name):
        write(report)
    os._exit(0)  # no thread or exit handler of the backend keeps the process


def try_out(name: str) -> Iterator[Report]:
    """The report before each stage, and at last with a verdict; runs the backend's code in this process."""
    report = Report(stage="starting")
    try:
        for report in _stages(name):
            yield report
    except QuantuneError as error:
        yield attrs.evolve(report, status="broken", reason=plain(str(error)))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a plugin's code can raise anything; it becomes the reason
        yield attrs.evolve(report, status="broken", reason=f"{report.stage} fails: {in_words(error)}")


def _stages(name: str) -> Iterator[Report]:
    report = Report(stage="importing its description")
    yield report
    description = registry.describe(name)
    yield attrs.evolve(report, stage="asking its probe")
    probe = registry.probe_of(description)
    report = attrs.evolve(report, devices=tuple(probe.devices), install=probe.install)
    if not probe.available:
        yield attrs.evolve(report, status="unavailable", reason=probe.reason or "its probe says so")
        return
    yield (report := attrs.evolve(report, stage="importing torch"))
    require_readable_packages()
    import torch

    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    yield (report := attrs.evolve(report, stage="loading its tensor code"))
    backend = registry.load_backend(description)
    for weight_dtype in description.weight_dtypes or (None,):
        for device in _devices(probe, weight_dtype):
            if device in here:
                stage = f"packing and dequantizing {weight_dtype or name} on {device}"
                yield (report := attrs.evolve(report, stage=stage))
                trip = _round_trip(description, backend, weight_dtype, device)
                report = attrs.evolve(report, round_trips=(*report.round_trips, trip))
    if report.round_trips:
        yield attrs.evolve(report, status="works")
        return
    devices = " and ".join(plain(device, 20) for device in probe.devices)
    reason = f"runs on {devices or 'no device'}, and torch finds {' and '.join(here)} here"
    yield attrs.evolve(report, status="unavailable", reason=reason)


def _devices(probe: Probe, weight_dtype: str | None) -> tuple[str, ...]:
    """Where the probe says that it runs; a probe that names no device is taken to mean the CPU at least."""
    return tuple(probe.devices_of.get(weight_dtype or "", probe.devices or ("cpu",)))


def _round_trip(description: BackendDescription, backend: Any, weight_dtype: str | None, device: str) -> RoundTrip:
    import torch

    from quantune.backends.backend import layout_of, pack_weight

    what = f"{weight_dtype or description.name} on {device}"
    options = default_options(description, weight_dtype)
    weight = torch.randn(TRIED_SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device)

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - started

    packed, pack_seconds = timed(lambda: pack_weight(backend, weight, options))
    hash(packed.layout)  # options that are no value would fail in a run
    back, _ = timed(lambda: backend.dequantize(packed, torch.float32))
    back, dequantize_seconds = timed(lambda: backend.dequantize(packed, torch.float32))  # the first one warms up
    expected = f"float32 {TRIED_SHAPE} on {device}"
    if not isinstance(back, torch.Tensor):
        raise BackendError(f"{what}: expected dequantize to return a tensor, found {type(back).__name__}")
    if back.dtype != torch.float32 or back.shape != weight.shape or back.device.type != device:
        found = f"{back.dtype} {tuple(back.shape)} on {back.device.type}".removeprefix("torch.")
        raise BackendError(f"{what}: expected dequantize to return {expected}, found {found}")
    error = float((back - weight).norm() / weight.norm())
    if not math.isfinite(error):
        raise BackendError(f"{what}: dequantizing gives NaN or infinity")
    if error >= 1:
        raise BackendError(f"{what}: dequantizing gives nothing like the weight (relative error {error:.2f})")
    bits = layout_of(backend, MEASURED_SHAPE, torch.float32, options).bits_per_weight
    declared = description.bits_per_weight.get(weight_dtype or description.name)
    return RoundTrip(
        weight_dtype=weight_dtype or description.name,
        device=device,
        bits_per_weight=bits,
        declared=None if declared is None else float(declared),
        relative_error=error,
        pack_seconds=pack_seconds,
        dequantize_seconds=dequantize_seconds,
    )
