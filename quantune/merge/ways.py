"""Merging in every way, and measuring what each keeps of what was trained."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path

import attrs
import torch

from quantune.errors import InputError, QuantizationError
from quantune.merge import comparison
from quantune.merge.comparison import Figures, WaysTable
from quantune.merge.merge import write
from quantune.merge.opening import open_merge, require_onto
from quantune.merge.request import MergeRequest, Observer
from quantune.merge.trial import load_merged, load_reference, prompts_for
from quantune.merge.weights import Onto

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
    prompts = prompts_for(opened, request)
    observer.phase("measuring base and adapter")
    trained = comparison.measure_trained(load_reference(opened, request), prompts)
    gc.collect()  # a model of transformers and PEFT refers to itself
    parent = request.out.parent if request.out.parent.is_dir() else Path.cwd()
    ways: dict[str, Figures] = {}
    folder = Path(tempfile.mkdtemp(prefix=".quantune-compare-", dir=parent))
    try:
        for way, (onto, aware) in WAYS.items():
            if aware and ("packed" not in ways or opened.setting.qat is not None):
                continue  # for the same reason, or what was trained is packed as it was
            out = folder / way
            try:
                require_onto(opened, onto)
                write(opened, attrs.evolve(request, onto=onto, aware=aware, out=out), observer)
            except (InputError, QuantizationError) as error:
                observer.warning(str(error))
                continue
            observer.phase(f"measuring {way}")
            ways[way] = comparison.measure(load_merged(out, opened, packed=onto == "packed"), trained, prompts)
            gc.collect()
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return comparison.table(prompts, trained, ways)
