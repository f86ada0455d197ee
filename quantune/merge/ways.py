"""Merging in every way, and measuring what each keeps of what was trained."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

from quantune.errors import FolderInUseError, InputError
from quantune.merge import comparison
from quantune.merge.comparison import Figures, WaysTable
from quantune.merge.merge import write
from quantune.merge.opening import open_merge, require_onto, require_same_base
from quantune.merge.request import MergeRequest, Observer
from quantune.merge.trial import load_merged, load_reference, prompts_for, require_memory
from quantune.merge.weights import Onto
from quantune.streaming.output import LOCK

WAYS: dict[str, tuple[Onto, bool]] = {
    "dequantized": ("dequantized", False),
    "original": ("original", False),
    "packed": ("packed", False),
    "packed, aware": ("packed", True),
}
"""What each way is in a request: onto what, and whether roundings are chosen."""


def compare_ways(request: MergeRequest, device: torch.device, observer: Observer) -> WaysTable:
    """Merge in every way that there is, into a folder that is removed again, and measure each.

    A way that there is not for this base is left out with a warning.

    Raises:
        InputError: the adapter or the base can't be used, or they don't belong together.
        QuantuneError: see `quantune.errors`.
    """
    opened = open_merge(request, device, observer)
    require_same_base(opened, request, observer)
    require_memory(opened, "--compare")
    prompts = prompts_for(opened, request)
    ways: dict[str, Figures] = {}
    with _held(request.out.with_name(f"{request.out.name}.compare")) as folder:
        observer.phase("measuring base and adapter")
        trained = comparison.measure_trained(load_reference(opened, request), prompts)
        gc.collect()  # a model of transformers and PEFT refers to itself
        for way, (onto, aware) in WAYS.items():
            if aware and ("packed" not in ways or opened.setting.qat is not None):
                continue  # for the same reason, or what was trained is packed as it was
            out = folder / way
            try:
                require_onto(opened, onto)
                write(opened, attrs.evolve(request, onto=onto, aware=aware, out=out), observer)
            except InputError as error:
                observer.warning(str(error))
                continue
            observer.phase(f"measuring {way}")
            ways[way] = comparison.measure(load_merged(out, opened, packed=onto == "packed"), trained, prompts)
            gc.collect()
            shutil.rmtree(out)
    return comparison.table(prompts, trained, ways)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """A folder for merged models that are not kept, held by this process; what one that died left is removed.

    Raises:
        InputError: it can't be written, or is somebody else's.
        FolderInUseError: another process holds it.
    """
    mark = folder / LOCK
    if folder.is_dir() and not mark.is_file() or folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is where merged models are compared, and is not quantune's; move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{folder}, for what is compared, can't be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FolderInUseError(f"{folder} is in use by another comparison; wait for it") from None
    try:
        for left in folder.iterdir():
            if left != mark:
                shutil.rmtree(left)
        yield folder
    finally:  # also when it is interrupted: these are models, and nobody asked for them
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
