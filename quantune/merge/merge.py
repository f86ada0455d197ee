"""From an adapter and its base to a merged checkpoint, told in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from quantune.checkpoint.fingerprint import environment
from quantune.checkpoint.run_folder import PACKED
from quantune.errors import ModelError, VerificationError
from quantune.merge import REPORT
from quantune.merge.opening import Opened, open_merge, require_onto, require_places, require_same_base, with_head
from quantune.merge.packed import choose_weights, pack_into, plan_packed, require_choice
from quantune.merge.request import MergeRequest, MergeResult, Observer
from quantune.merge.trained import BASE_FILES
from quantune.merge.trial import is_exact, try_merged
from quantune.merge.verify import Verification
from quantune.merge.weights import BaseWeights, MergeJob, vocabulary_weights
from quantune.model.load import fingerprint_of
from quantune.model.vocabulary import Additions
from quantune.quantize.packer import Packer
from quantune.streaming.adopted import AdoptedSource, adopted
from quantune.streaming.companions import companion_bytes, write_companions
from quantune.streaming.mapping import Unit, units
from quantune.streaming.output import Output, disk_errors, open_output, require_free, require_space
from quantune.streaming.rewrite import planned_bytes, rewrite
from quantune.streaming.source import Source, main_dtype, open_source

Try = Callable[[Path, torch.dtype], Verification | None]
"""Compares the model in a folder, its weights in a dtype, with base and adapter; raises where it is another one."""


def merge(request: MergeRequest, device: torch.device, observer: Observer) -> MergeResult:
    """Write base and adapters as one checkpoint.

    Args:
        device: where weights are packed and added.

    Raises:
        InputError: the adapter, the base or the folder can't be used, or they don't belong together.
        VerificationError: the merged model answers otherwise than base and adapter; nothing is under its name.
        QuantuneError: see `quantune.errors`.
    """
    require_free(request.out, REPORT, overwrite=request.overwrite)
    opened = open_merge(request, device, observer)
    require_onto(opened, request.onto)
    if request.aware:
        require_choice(opened)
    with open_source(opened.folder) as stored:
        job, found, packing = prepare(opened, request, stored)
        written = job if packing is None else pack_into(job, packing, found, {})
        beside = companion_bytes(opened.folder)
        require_space(request.out, planned_bytes(job.source, found, written, beside=beside))
    require_same_base(opened, request, observer)

    def trial(folder: Path, dtype: torch.dtype) -> Verification | None:
        return try_merged(opened, request, folder, dtype, observer)

    return write(opened, request, observer, trial)


def write(opened: Opened, request: MergeRequest, observer: Observer, trial: Try | None = None) -> MergeResult:
    """Write what was opened; `trial` is given the folder before it has its name.

    Raises:
        InputError: the folder exists, or there is nothing to merge onto in this way.
        QuantuneError: see `quantune.errors`.
    """
    begun = time.perf_counter()
    require_onto(opened, request.onto)
    identity = _identity(opened, request)
    with (
        open_output(request.out, report=REPORT, identity=identity, overwrite=request.overwrite) as output,
        open_source(opened.folder) as stored,
    ):
        if output.resumed:
            observer.note(f"going on with {output.partial}: {len(output.complete)} of its files are complete")
        if output.discarded:
            observer.note(f"{output.partial} was of another merge, and is begun anew")
        job, found, packing = prepare(opened, request, stored)
        chosen = choose_weights(opened, request, observer) if request.aware else {}
        observer.phase("merging")
        written = pack_into(job, packing, found, chosen) if packing is not None else job
        nbytes = rewrite(
            job.source,
            found,
            written,
            output,
            observer,
            beside=companion_bytes(opened.folder),
            max_shard_size=request.max_shard_size,
        )
        if request.onto == "dequantized" and opened.base.stored is None:
            _compare_packed(request, job.notes, output, observer)
        dtype = request.dtype or job.main_dtype
        with disk_errors(output.target):
            write_companions(
                output.partial,
                opened.base,
                opened.folder,
                opened.setting.model,
                opened.model,
                dtype=dtype,
                untied=opened.untied,
                quantization_config=None
                if packing is None
                else packing.reader.quantization_config(packing.kept, dtype),
            )
        result = MergeResult(
            folder=request.out,
            **_counts(job, found, packing),
            nbytes=nbytes,
            seconds=time.perf_counter() - begun,
            dtype=str(dtype).removeprefix("torch."),
            exact=is_exact(opened, request.onto),
            verification=None if trial is None else _tried(trial, output, dtype),
        )
        with disk_errors(output.target):
            (output.partial / REPORT).write_text(_report(result, request, identity), encoding="utf-8")
            output.publish()
    return result


def prepare(opened: Opened, request: MergeRequest, stored: Source) -> tuple[MergeJob, list[Unit], Packer | None]:
    """What gives the merged weights, of which units of the base's checkpoint, and what packs them, if anything does.

    Raises:
        ModelError: the checkpoint lacks a weight that the adapter changes.
        InputError: no library reads the format, or it does not take one of the weights.
    """
    job = _job(opened, request, stored)
    found = units(opened.model, job.source.specs)
    require_places(opened, found)
    packing = (
        plan_packed(opened, found, job.source, request.dtype or job.main_dtype) if request.onto == "packed" else None
    )
    return job, with_head(found, opened.model) if opened.untied else found, packing


def _counts(job: MergeJob, found: Sequence[Unit], packing: Packer | None) -> dict[str, int]:
    """How many weights were merged, how many others are what packing makes of them, and what stays as it was."""
    parts = {} if packing is None else packing.parts
    there = {name for unit in found for name in unit.parameters}
    packed = {parts[key].parameter for unit in found for key in unit.keys if key in parts}
    dense = job.base.packed if job.onto == "dequantized" else frozenset()
    untouched = [unit for unit in found if not any(job.touches(name, unit) for name in unit.parameters)]
    return {
        "merged": len(job.changed & there),
        "dequantized": len((dense & there) - job.changed),
        "packed": len(packed - job.changed),
        "kept": sum(len(unit.keys) for unit in untouched if parts.keys().isdisjoint(unit.keys)),
    }


def _tried(trial: Try, output: Output, dtype: torch.dtype) -> Verification | None:
    """What `trial` finds; a folder that it rejects is removed, nobody should go on with it."""
    try:
        return trial(output.partial, dtype)
    except VerificationError:
        output.discard()
        raise


def _job(opened: Opened, request: MergeRequest, stored: Source) -> MergeJob:
    source = stored
    if opened.base.stored is not None and opened.plan is not None:
        source = adopted(stored, opened.model, opened.plan, opened.device)
    return MergeJob(
        source=source,
        base=BaseWeights.of(
            opened.model,
            opened.plan,
            opened.initialization,
            opened.dtype,
            opened.device,
            rounded=frozenset() if opened.rounding is None else opened.rounding.parameters,
            rounding=opened.format,
        ),
        update=opened.update,
        changed=opened.update.names(),
        onto=request.onto,
        vocabulary=frozenset() if opened.base.additions == Additions() else vocabulary_weights(opened.model),
        dtype=request.dtype,
        main_dtype=main_dtype(stored),
        quantized=frozenset(source.packed) if isinstance(source, AdoptedSource) else frozenset(),
    )


def _identity(opened: Opened, request: MergeRequest) -> dict[str, Any]:
    """What must be the same for another process to go on."""
    files = sorted(opened.folder.glob("*.safetensors"))
    quantization = opened.base.quantization
    return {
        "adapters": [
            {"folder": str(adapter.folder), "weight": weight, "sha256": adapter.digest()}
            for adapter, weight in zip(request.adapters, request.weights, strict=True)
        ],
        "base": opened.base.source,
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "quantization": None if quantization is None else attrs.asdict(quantization),
        "setting": attrs.asdict(opened.setting),
        "data": attrs.asdict(request.recipe.data) if request.aware and request.recipe is not None else None,
        "device": opened.device.type,
        "onto": request.onto,
        "aware": request.aware,
        "dtype": str(request.dtype),
        "max_shard_size": request.max_shard_size,
        "versions": environment()["versions"],
    }


def _compare_packed(request: MergeRequest, digests: Mapping[str, str], output: Output, observer: Observer) -> None:
    """Compare the bytes that the base packs to with those that were trained on.

    Raises:
        ModelError: they are others, and nothing else says that it is the base that was trained on.
    """
    then = {adapter.fingerprints.get(PACKED) for adapter in request.adapters} - {None}
    if not digests or not then or then == {fingerprint_of(digests)}:
        return
    known = all(BASE_FILES in adapter.fingerprints for adapter in request.adapters)
    if not known and not request.force:
        output.discard()
        raise ModelError(
            f"the adapter in {request.adapters[0].folder} was trained on another base: this one packs to other bytes. "
            "Name the right base with --base; --force merges all the same"
        )
    observer.warning(
        "the base packs to other bytes here than where it was trained on: another machine, or an older quantune, "
        "rounds otherwise; the merged model may differ slightly"
    )


def _report(result: MergeResult, request: MergeRequest, identity: Mapping[str, Any]) -> str:
    document = {
        **{key: identity[key] for key in ("adapters", "base", "quantization", "onto", "aware", "versions")},
        "forced": request.force,
        "dtype": result.dtype,
        "merged": result.merged,
        "dequantized": result.dequantized,
        "kept": result.kept,
        "verification": None if result.verification is None else attrs.asdict(result.verification),
    }
    return json.dumps(document, indent=1, default=str) + "\n"
