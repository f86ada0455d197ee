"""A run from a resolved recipe to an adapter, told in order."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from quantune.checkpoint.commit import write_committed
from quantune.checkpoint.fingerprint import environment, hash_files
from quantune.checkpoint.history import digest
from quantune.checkpoint.identity import Identity
from quantune.checkpoint.run_folder import PACKED, RunFolder
from quantune.checkpoint.saver import Saver
from quantune.checkpoint.state import TrainingState, capture
from quantune.data.dataset import Dataset
from quantune.data.prepare import prepare
from quantune.distributed.sharding import Root, shard
from quantune.distributed.shares import Shares
from quantune.distributed.stopping import BEFORE_THE_FIRST_STEP, Phase, StopRequest
from quantune.distributed.watch import LOADING_PATIENCE
from quantune.distributed.world import World, joined
from quantune.errors import InputError, InterruptedRun
from quantune.model import adapter, targets
from quantune.model.activations import offloading, recompute_blocks
from quantune.model.base import Base, open_base, require_attention, skeleton
from quantune.model.compilation import compile_blocks, require_compiler, suspended
from quantune.model.device import DTYPES, choose_device, tf32
from quantune.model.initialization import Initialization
from quantune.model.load import check_plan, load_model, module_table, packed_fingerprint
from quantune.model.quantizer import quantizable_experts
from quantune.model.start import check_start, load_start
from quantune.model.vocabulary import Additions
from quantune.recipe.resolve import to_toml
from quantune.recipe.schema import Recipe
from quantune.training.evaluate import Stopped, evaluate
from quantune.training.loop import Hooks, Job, Progress, StepResult, evaluation_due, fit
from quantune.training.loss import Loss, build_loss
from quantune.training.memory import measure_peak
from quantune.training.observer import EvaluationResult, ModelSummary, Observer
from quantune.training.optimizer import build_optimizer, require_optimizer
from quantune.training.packed_rows import RowLayout, layout_for
from quantune.training.resolve import idle_processes, resolve, without_effect
from quantune.training.resuming import begin_attempt, identify, open_checkpoint, put_back, require_same_run

SHARED = ("model", "quantization", "adapter", "training", "evaluation", "checkpoint")
"""Sections that are the same for every process; the data is compared by its tokens."""
ALONE = World()
Beat = Callable[[str, float], None]
"""Is told what a process does next, and how many timeouts it may take."""
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
                observer,
                stop,
                beat,
                world,
                mesh,
                device,
                resume=world.broadcast(resume),
                allow_changes=allow_changes,
                allow_remote_code=allow_remote_code,
            )


def _unwatched(doing: str, patience: float) -> None:
    """Nobody waits for a process that is alone."""


def _train(
    recipe: Recipe,
    folder: RunFolder,
    observer: Observer,
    stop: StopRequest,
    beat: Beat,
    world: World,
    mesh: DeviceMesh | None,
    device: torch.device,
    *,
    resume: bool,
    allow_changes: Collection[str],
    allow_remote_code: bool,
) -> RunResult:
    begun = time.perf_counter()

    def phase(text: str) -> None:
        observer.phase(text)
        beat(text, LOADING_PATIENCE)

    written = recipe
    if recipe.training.compile:
        require_compiler(device)
    require_optimizer(recipe.training, device, world.size)
    require_attention(recipe.model, device)
    for sentence in without_effect(recipe, device):
        observer.warning(sentence)

    checkpoint = open_checkpoint(folder, observer, world) if resume else None
    if resume and checkpoint is None:
        observer.warning("the run stopped before its first checkpoint was committed; it begins again")

    phase("opening the base")
    base = open_base(recipe.model, recipe.quantization, allow_remote_code=allow_remote_code)
    recipe = attrs.evolve(recipe, quantization=base.quantization)
    meta = skeleton(base)
    _check_model(recipe, base, meta, device, observer)
    start = None if recipe.adapter.start_from is None or checkpoint is not None else Path(recipe.adapter.start_from)
    if start is not None:  # a run that goes on has the weights of its checkpoint
        _check_start(start, folder, recipe, base)
    embedding: Any = meta.get_input_embeddings()

    phase("reading the data")
    data = prepare(
        recipe.data,
        base.tokenizer,
        seed=recipe.training.seed,
        vocabulary_size=embedding.num_embeddings,
        observer=observer,
    )
    dataset, held_out = data.train, data.eval
    observer.data("train", dataset.counts)
    if held_out is not None:
        observer.data("eval", held_out.counts)
    pad_to = recipe.data.max_length if recipe.data.pad_to_max_length else 0
    longest = max(pad_to, *(len(sample.input_ids) for sample in dataset.samples))
    recipe = resolve(recipe, device=device, sample_count=len(dataset.samples), longest=longest, world=world)
    idle = idle_processes(recipe.training, world)
    if idle is not None:
        observer.warning(idle)
    identity = identify(written, recipe, base, data, device, world)
    _require_same(identity, held_out, world)
    if checkpoint is not None:
        identity = require_same_run(checkpoint, identity, allow_changes, observer)

    phase("loading the base")
    split = adapter.build_initialization(meta, recipe.adapter, seed=recipe.training.seed)
    shares = None
    if mesh is not None:
        offload = recipe.distributed.cpu_offload
        whole = adapter.needed_whole(meta, recipe.adapter, grown=base.additions != Additions())
        shares = Shares(world=world, mesh=mesh, device=device, offload=offload, whole=whole)
    model, summary, packed = _load(recipe, base, device, split, start, shares, world)
    observer.model(summary)
    root = Root(model)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    if recipe.training.activation_checkpointing:
        recompute_blocks(inner)
    if recipe.training.compile:
        phase("compiling: the first steps take longer, up to minutes")
        compile_blocks(inner)
    if mesh is not None:
        shard(root, mesh, device, cpu_offload=recipe.distributed.cpu_offload)
    with suspended(recipe.training.compile):
        loss: Loss = root(build_loss, inner, device)
        layout = root(layout_for, inner, device) if recipe.data.packing else RowLayout()
        root.reshard()
    root.traffic.take()
    if recipe.training.activation_checkpointing == "offload":
        loss = offloading(loss, inner)
    parameters = adapter.trainable_parameters(model)
    optimizer = build_optimizer(parameters, recipe.training)

    prints = {**identity.fingerprints, PACKED: packed}
    if recipe.adapter.start_from is not None:
        begun_with = Path(recipe.adapter.start_from)
        if checkpoint is not None and not begun_with.is_dir():
            prints[START] = checkpoint.identity.fingerprints.get(START)
        else:
            prints[START] = hash_files(begun_with.glob("adapter_*"))
    if split is not None:
        prints["the weights that the adapter's share was taken out of"] = dict(sorted(split.dense_digests.items()))
    identity = attrs.evolve(identity, fingerprints=prints)
    progress = Progress()
    if checkpoint is not None:
        phase(f"resuming from {checkpoint.path.name}")
        seed = recipe.training.seed
        progress = put_back(checkpoint, identity, parameters, optimizer, seed=seed, world=world)
    if world.main:
        if resume:
            folder.metrics.truncate_after(-1 if checkpoint is None else progress.step)
        else:
            folder.clear()
        folder.write_recipe(to_toml(recipe))
        counts = {part: attrs.asdict(read.counts) for part, read in (("train", dataset), ("eval", held_out)) if read}
        folder.write_manifest({**environment(), "device": summary.device, "data": counts, "fingerprints": prints})
        folder.write_status("running", progress.step)
        begin_attempt(folder, checkpoint, progress, recipe, len(dataset.samples), world)

    resumed_at = progress.step
    evaluations: list[EvaluationResult] = []
    history = folder.history

    def record(done: StepResult) -> None:
        beat(f"training, after step {done.metrics.step}", 1.0)
        if world.main:
            tokens = ((sample.input_ids, sample.is_target) for sample in done.samples)
            history.append("step", step=done.metrics.step, samples=list(done.indices), digest=digest(tokens))
            folder.metrics.append({"event": "step", **attrs.asdict(done.metrics)})

    def run_evaluation(step: int) -> bool:
        if held_out is None:
            return False
        beat(f"evaluating after step {step}", 1.0)
        try:
            with suspended(recipe.training.compile):
                result = evaluate(
                    root,
                    loss,
                    held_out.samples,
                    base.tokenizer,
                    recipe.evaluation,
                    pad_id=base.pad_id,
                    device=device,
                    step=step,
                    pad_to=pad_to,
                    world=world,
                    asked=lambda: stop.asked,
                )
        except Stopped:
            return True
        if world.main:
            folder.metrics.append({"event": "evaluation", **attrs.asdict(result)})
            history.append("evaluation", step=step)
        evaluations.append(result)
        observer.evaluation(result)
        beat(f"training, after step {step}", 1.0)
        return False

    def committed(step: int) -> None:
        history.append("checkpoint", step=step)
        folder.write_status("running", step)
        observer.checkpoint(step)

    def flush() -> None:
        history.flush()
        folder.metrics.flush()

    saver = Saver(
        store=folder.checkpoints,
        keep=recipe.checkpoint.keep,
        prepare=flush,
        committed=committed,
        lost=observer.warning,
        world=world,
    )

    def take() -> TrainingState | None:
        state = capture(
            parameters=parameters,
            optimizer=optimizer,
            progress=attrs.asdict(progress),
            identity=identity.to_json(),
            world=world,
        )
        if world.main:
            history.append("saving", step=progress.step)
        return state

    def save(progress: Progress) -> None:
        beat(f"saving after step {progress.step}", LOADING_PATIENCE)  # the save before it may still be under way
        saver.save(progress.step, take)
        beat(f"training, after step {progress.step}", 1.0)

    assert recipe.training.max_steps is not None and recipe.training.warmup_steps is not None
    assert isinstance(recipe.training.micro_batch_size, int)
    job = Job(
        recipe=recipe,
        world=world,
        root=root,
        loss=loss,
        parameters=parameters,
        optimizer=optimizer,
        dataset=dataset,
        device=device,
        pad_id=base.pad_id,
        total_steps=recipe.training.max_steps,
        warmup_steps=recipe.training.warmup_steps,
        micro_batch_size=recipe.training.micro_batch_size,
        pad_to=pad_to,
        layout=layout,
    )
    hooks = Hooks(record=record, evaluate=run_evaluation, save=save, failed=saver.failed, settle=saver.finish)
    stop.enter(Phase.TRAINING)
    with saver, tf32(recipe.training.tf32):
        due = evaluation_due(recipe.evaluation, progress.step, job.total_steps)
        stopped = False
        if due and not world.broadcast(world.main and _evaluated(folder, progress.step)):
            stopped = run_evaluation(progress.step)  # a run that is asked to stop does not wait for it
        beat("training its first step", LOADING_PATIENCE)
        finished = not stopped and fit(job, progress, hooks, observer, stop)
        saver.finish()
        if not finished:
            if world.main:
                history.append("interrupted", step=progress.step)
                folder.write_status("interrupted", progress.step)
            saved = f"stopped after step {progress.step} and saved; --resume goes on from there"
            raise InterruptedRun(saved if progress.step else BEFORE_THE_FIRST_STEP)
    beat("writing the adapter", LOADING_PATIENCE)
    _publish_adapter(model, base, folder, world)
    if world.main:
        history.append("finished", step=progress.step)
        folder.write_status("finished", progress.step)
    return RunResult(
        folder=folder.path,
        adapter=folder.adapter,
        steps=progress.step,
        steps_before=resumed_at,
        seconds=time.perf_counter() - begun,
        evaluations=tuple(evaluations),
    )


def _check_model(recipe: Recipe, base: Base, meta: PreTrainedModel, device: torch.device, observer: Observer) -> None:
    """Check targets and quantization against the model without weights, and warn of what has no effect there."""
    targets.match_targets(meta, recipe.adapter)
    targets.match_parameters(meta, recipe.adapter.target_parameters)
    targets.require_trained_tokens(meta, base.additions, recipe.adapter)
    if recipe.quantization is not None:
        check_plan(meta, recipe.quantization, device, base.stored)
        targets.require_packed_target(meta, recipe.adapter, recipe.quantization, base.stored)
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


def _load(
    recipe: Recipe,
    base: Base,
    device: torch.device,
    split: Initialization | None,
    start: Path | None,
    shares: Shares | None,
    world: World,
) -> tuple[PeftModel, ModelSummary, str]:
    """The base with an adapter, fresh or from `start`, what to say of it, and the fingerprint of its packed weights."""
    begun = time.perf_counter()
    dtype = DTYPES[recipe.training.precision]
    with measure_peak(device) as peak:
        model = load_model(
            base, recipe.quantization, compute_dtype=dtype, device=device, initialization=split, shares=shares
        )
    rows = module_table(model)  # before the adapter changes the modules' names
    packed = world.broadcast(packed_fingerprint(model, counts=world.main))
    peft_model = adapter.attach(
        model, recipe.adapter, base_name=base.source, seed=recipe.training.seed, initialization=split
    )
    if start is not None:
        load_start(peft_model, start)
    if not world.main:  # all ranks began with the same adapter; from here on each draws for itself
        torch.manual_seed(int(np.random.SeedSequence((recipe.training.seed, world.rank)).generate_state(1)[0]))
    summary = ModelSummary(
        base=base.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processes=world.size,
        precision=recipe.training.precision,
        rows=rows,
        trainable=sum(parameter.numel() for parameter in adapter.trainable_parameters(peft_model).values()),
        targets=sum(hasattr(module, "lora_A") for module in peft_model.modules()),
        peak_bytes=peak.nbytes,
        seconds=time.perf_counter() - begun,
    )
    return peft_model, summary, packed


def _evaluated(folder: RunFolder, step: int) -> bool:
    return any(row["event"] == "evaluation" and row["step"] == step for row in folder.metrics.rows())


def _publish_adapter(model: PeftModel, base: Base, folder: RunFolder, world: World) -> None:
    whole = adapter.whole_state(model)
    if not world.main:
        return

    def write(path: Path) -> None:
        adapter.save_adapter(model, path, whole)
        base.tokenizer.save_pretrained(path)  # with the tokens that were added: whoever loads the adapter needs them

    # replaced: an attempt may have died between writing the adapter and saying that it was finished
    write_committed(folder.path, folder.adapter.name, write, replace=True)
