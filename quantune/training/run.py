"""A run from a resolved recipe to an adapter, told in order."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from quantune.checkpoint.commit import write_committed
from quantune.checkpoint.fingerprint import environment, hash_files
from quantune.checkpoint.identity import Identity
from quantune.checkpoint.run_folder import RunFolder
from quantune.data.dataset import Dataset
from quantune.data.prepare import RunData, prepare
from quantune.distributed.stopping import BEFORE_THE_FIRST_STEP, Phase, StopRequest
from quantune.distributed.watch import LOADING_PATIENCE
from quantune.distributed.world import World, joined
from quantune.errors import InputError, InterruptedRun
from quantune.model import adapter, targets
from quantune.model.base import Base, open_base, require_attention, skeleton
from quantune.model.compilation import require_compiler
from quantune.model.device import choose_device, tf32
from quantune.model.load import check_plan
from quantune.model.quantizer import quantizable_experts
from quantune.model.start import check_start
from quantune.recipe.resolve import to_toml
from quantune.recipe.schema import Recipe
from quantune.training.building import Built, build
from quantune.training.loop import Job, Progress, evaluation_due, fit
from quantune.training.observer import EvaluationResult, Observer
from quantune.training.optimizer import require_optimizer
from quantune.training.process import Beat, Process
from quantune.training.recording import Recorder
from quantune.training.resolve import idle_processes, read_otherwise, resolve, without_effect
from quantune.training.resuming import (
    Checkpoint,
    begin_attempt,
    identify,
    open_checkpoint,
    put_back,
    require_same_run,
)

SHARED = ("model", "quantization", "adapter", "training", "evaluation", "checkpoint")
"""Sections that are the same for every process; the data is compared by its tokens."""
ALONE = World()
Watching = Callable[[float], contextlib.AbstractContextManager[Beat]]
START = "the adapter that training starts from"
"""Its name among the fingerprints."""


@attrs.frozen(kw_only=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    steps: int
    """Steps of the whole run."""
    steps_before: int
    """Those of them that were done before it was resumed."""
    seconds: float
    """What the others took, loading included."""
    evaluations: tuple[EvaluationResult, ...]


def train(
    recipe: Recipe,
    folder: RunFolder,
    observer: Observer,
    *,
    world: World = ALONE,
    resume: bool = False,
    allow_changes: Collection[str] = (),
    allow_remote_code: bool = False,
    watching: Watching | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train what `recipe` (with absolute paths) says, in `folder`, as one of the processes of `world`.

    All of them call this with the same arguments; the folder is written by rank 0 alone. With `watching`, which is
    given the seconds that a rank may take, they watch each other. `resume` is rank 0's to say. `stop` may have been
    listening before.

    Args:
        resume: go on from the latest checkpoint, or begin again where none was committed.
        allow_changes: keys of the recipe that may be others than the run was begun with, e.g. `training.max_steps`.

    Raises:
        InputError: the recipe, base, data or targets can't be used, or are not those that the run was begun with; found
            before any weight is loaded.
        QuantuneError: see `quantune.errors`.
    """
    if isinstance(recipe.distributed.threads, int):
        torch.set_num_threads(recipe.distributed.threads)
    device = choose_device(recipe.training.device, world.local_rank)
    seconds = recipe.distributed.timeout
    # a rank that hangs is named by the watch; the exchanges themselves give up later, should the watch fail
    patience = timedelta(seconds=LOADING_PATIENCE * seconds + 60)
    with (
        (stop or StopRequest(observer.warning)).listening() as stop,
        contextlib.nullcontext(_unwatched) if watching is None or world.size == 1 else watching(seconds) as beat,
    ):
        stop.enter(Phase.LOADING)
        with joined(world, device, patience, alone=recipe.distributed.cpu_offload) as mesh:
            return _train(
                recipe,
                folder,
                Process(world=world, mesh=mesh, device=device, observer=observer, beat=beat, stop=stop),
                resume=world.broadcast(resume),
                allow_changes=allow_changes,
                allow_remote_code=allow_remote_code,
            )


def _unwatched(doing: str, patience: float) -> None:
    """Nobody waits for a process that is alone."""


def _train(
    recipe: Recipe,
    folder: RunFolder,
    process: Process,
    *,
    resume: bool,
    allow_changes: Collection[str],
    allow_remote_code: bool,
) -> RunResult:
    begun = time.perf_counter()
    written, world, device, observer = recipe, process.world, process.device, process.observer
    if recipe.training.compile:
        require_compiler(device)
    require_optimizer(recipe.training, device, world.size)
    require_attention(recipe.model, device)
    for sentence in without_effect(recipe, device):
        observer.warning(sentence)

    checkpoint = open_checkpoint(folder, observer, world) if resume else None
    if resume and checkpoint is None:
        observer.warning("the run stopped before its first checkpoint was committed; it begins again")

    process.phase("opening the base")
    base = open_base(recipe.model, recipe.quantization, allow_remote_code=allow_remote_code)
    recipe = attrs.evolve(recipe, quantization=base.quantization)
    meta = skeleton(base)
    _check_model(recipe, base, meta, device, observer)
    start = None if recipe.adapter.start_from is None or checkpoint is not None else Path(recipe.adapter.start_from)
    if start is not None:  # a run that goes on has the weights of its checkpoint
        _check_start(start, folder, recipe, base)

    process.phase("reading the data")
    data, recipe, pad_to = _read(recipe, base, meta, process)
    identity = identify(written, recipe, base, data, device, world)
    _require_same(identity, data.eval, world)
    if checkpoint is not None:
        identity = require_same_run(checkpoint, identity, allow_changes, observer)

    process.phase("loading the base")
    built = build(recipe, base, meta, start, process)
    identity = attrs.evolve(
        identity, fingerprints={**identity.fingerprints, **built.fingerprints, **_start(recipe, checkpoint)}
    )
    progress = Progress()
    if checkpoint is not None:
        process.phase(f"resuming from {checkpoint.path.name}")
        seed = recipe.training.seed
        progress = put_back(checkpoint, identity, built.parameters, built.optimizer, seed=seed, world=world)
    if world.main:
        if resume:
            folder.metrics.truncate_after(-1 if checkpoint is None else progress.step)
        else:
            folder.clear()
        folder.write_recipe(to_toml(recipe))
        folder.write_manifest(_manifest(built, data, identity))
        folder.write_status("running", progress.step)
        begin_attempt(folder, checkpoint, progress, recipe, len(data.train.samples), world)

    steps_before = progress.step
    assert recipe.training.max_steps is not None and recipe.training.warmup_steps is not None
    assert isinstance(recipe.training.micro_batch_size, int)
    job = Job(
        recipe=recipe,
        world=world,
        root=built.root,
        loss=built.loss,
        parameters=built.parameters,
        optimizer=built.optimizer,
        dataset=data.train,
        device=device,
        pad_id=base.pad_id,
        total_steps=recipe.training.max_steps,
        warmup_steps=recipe.training.warmup_steps,
        micro_batch_size=recipe.training.micro_batch_size,
        pad_to=pad_to,
        layout=built.layout,
        rounding=built.rounding,
    )
    recorder = Recorder(
        job=job, folder=folder, process=process, tokenizer=base.tokenizer, held_out=data.eval, identity=identity
    )
    process.stop.enter(Phase.TRAINING)
    with recorder.saver, tf32(recipe.training.tf32):
        due = evaluation_due(recipe.evaluation, progress.step, job.total_steps)
        stopped = False
        if due and not world.broadcast(world.main and _evaluated(folder, progress.step)):
            stopped = recorder.evaluate(progress.step)  # a run that is asked to stop does not wait for it
        process.beat("training its first step", LOADING_PATIENCE)
        finished = not stopped and fit(job, progress, recorder.hooks(), observer, process.stop)
        recorder.saver.finish()
        if not finished:
            recorder.ended("interrupted", progress.step)
            saved = f"stopped after step {progress.step} and saved; --resume goes on from there"
            raise InterruptedRun(saved if progress.step else BEFORE_THE_FIRST_STEP)
    process.beat("writing the adapter", LOADING_PATIENCE)
    _publish_adapter(built.model, base, folder, world, to_toml(recipe), _manifest(built, data, identity))
    recorder.ended("finished", progress.step)
    return RunResult(
        folder=folder.path,
        adapter=folder.adapter,
        steps=progress.step,
        steps_before=steps_before,
        seconds=time.perf_counter() - begun,
        evaluations=tuple(recorder.evaluations),
    )


def _read(recipe: Recipe, base: Base, meta: PreTrainedModel, process: Process) -> tuple[RunData, Recipe, int]:
    """The data, the recipe with nothing left open, and the tokens that every batch is padded to at least."""
    observer = process.observer
    embedding: Any = meta.get_input_embeddings()
    data = prepare(
        recipe.data,
        base.tokenizer,
        seed=recipe.training.seed,
        vocabulary_size=embedding.num_embeddings,
        observer=observer,
    )
    observer.data("train", data.train.counts)
    if data.eval is not None:
        observer.data("eval", data.eval.counts)
    samples = data.train.samples
    pad_to = recipe.data.max_length if recipe.data.pad_to_max_length else 0
    longest = max(pad_to, *(len(sample.input_ids) for sample in samples))
    resolved = resolve(recipe, device=process.device, sample_count=len(samples), longest=longest, world=process.world)
    idle = idle_processes(resolved.training, process.world)
    if idle is not None:
        observer.warning(idle)
    return data, resolved, pad_to


def _start(recipe: Recipe, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The fingerprint of the adapter that the run began with, if any; a run that goes on may do without its files."""
    if recipe.adapter.start_from is None:
        return {}
    folder = Path(recipe.adapter.start_from)
    if checkpoint is not None and not folder.is_dir():
        return {START: checkpoint.identity.fingerprints.get(START)}
    return {START: hash_files(folder.glob("adapter_*"))}


def _manifest(built: Built, data: RunData, identity: Identity) -> dict[str, Any]:
    """What the run is made of."""
    counts = {part: attrs.asdict(read.counts) for part, read in (("train", data.train), ("eval", data.eval)) if read}
    return {
        **environment(),
        "device": built.summary.device,
        "data": counts,
        "fingerprints": identity.fingerprints,
    }


def _check_model(recipe: Recipe, base: Base, meta: PreTrainedModel, device: torch.device, observer: Observer) -> None:
    """Check targets and quantization against the model without weights, and warn of what has no effect there."""
    targets.match_targets(meta, recipe.adapter)
    targets.match_parameters(meta, recipe.adapter.target_parameters)
    targets.require_trained_tokens(meta, base.additions, recipe.adapter)
    if recipe.quantization is not None:
        check_plan(meta, recipe.quantization, device, base.stored)
        targets.require_packed_target(meta, recipe.adapter, recipe.quantization, base.stored)
        otherwise = read_otherwise(recipe)
        if otherwise is not None:
            observer.warning(otherwise)
        if not recipe.quantization.experts and next(quantizable_experts(meta, ()), None) is None:
            observer.warning("[quantization] experts = false has no effect: this base has no fused experts")
    beside = targets.left_out(meta) if targets.takes_all_linear(recipe.adapter) else []
    if beside:
        observer.warning(
            f"all-linear leaves out {len(beside)} linear layers beside the experts, e.g. {beside[0]}: PEFT takes their "
            "names for the experts' fused weights"
        )


def _check_start(start: Path, folder: RunFolder, recipe: Recipe, base: Base) -> None:
    if start.resolve().is_relative_to(folder.path.resolve()):
        raise InputError(
            f"[adapter] start_from: {start} lies in the folder of this run, which is cleared when the run starts; "
            "choose another [output] dir"
        )
    vocabulary = base.tokenizer.get_vocab()
    added = {token: vocabulary[token] for token in base.additions.tokens}
    check_start(start, skeleton(base), recipe.adapter, added)


def _require_same(identity: Identity, held_out: Dataset | None, world: World) -> None:
    """Require that every process reads the same recipe, base and data: another batch or another step at which one
    evaluates would be another exchange than that of the others."""
    if world.size == 1:
        return
    recipe = identity.resolved
    parts = {**identity.fingerprints, **{f"[{section}]": recipe.get(section) for section in SHARED}}
    parts["the tokens of the evaluation data"] = None if held_out is None else held_out.fingerprint()
    parts["[data]"] = {key: value for key, value in recipe["data"].items() if key not in ("train", "eval")}
    hosts = world.gather((socket.gethostname(), parts))
    first_host, first = hosts[0]
    for rank, (host, others) in enumerate(hosts):
        differing = [key for key in first if others.get(key) != first[key]]
        if differing:
            raise InputError(
                f"expected the same of every process, found {differing[0]} of rank {rank} on {host} to differ from "
                f"that of rank 0 on {first_host}; give every machine the same recipe and files"
            )


def _evaluated(folder: RunFolder, step: int) -> bool:
    return any(row["event"] == "evaluation" and row["step"] == step for row in folder.metrics.rows())


def _publish_adapter(
    model: PeftModel, base: Base, folder: RunFolder, world: World, recipe: str, manifest: dict[str, Any]
) -> None:
    whole = adapter.whole_state(model)
    if not world.main:
        return

    def write(path: Path) -> None:
        adapter.save_adapter(model, path, whole)
        base.tokenizer.save_pretrained(path)  # with the tokens that were added: whoever loads the adapter needs them
        (path / adapter.RECIPE).write_text(
            recipe, encoding="utf-8"
        )  # an adapter that is carried off says what it belongs to
        (path / adapter.ORIGIN).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    # replaced: an attempt may have died between writing the adapter and saying that it was finished
    write_committed(folder.path, folder.adapter.name, write, replace=True)
