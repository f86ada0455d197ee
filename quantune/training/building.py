"""From a checked recipe to a model that can be trained: loaded, adapted, sharded, with its loss and optimizer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from quantune.checkpoint.run_folder import PACKED
from quantune.distributed.sharding import Root, shard
from quantune.distributed.shares import Shares
from quantune.distributed.world import World
from quantune.model import adapter, qat
from quantune.model.activations import offloading, recompute_blocks
from quantune.model.base import Base
from quantune.model.compilation import compile_blocks, suspended
from quantune.model.device import DTYPES
from quantune.model.initialization import Initialization
from quantune.model.load import load_model, module_table, packed_fingerprint
from quantune.model.start import load_start
from quantune.model.vocabulary import Additions
from quantune.quantized.rounding import Rounding
from quantune.recipe.schema import Recipe
from quantune.training.loss import Loss, build_loss
from quantune.training.memory import measure_peak
from quantune.training.observer import ModelSummary
from quantune.training.optimizer import build_optimizer
from quantune.training.packed_rows import RowLayout, layout_for
from quantune.training.process import Process


@attrs.frozen(kw_only=True, eq=False)
class Built:
    """A model that can be trained."""

    model: PeftModel
    root: Root
    """The same, alone or sharded."""
    loss: Loss
    layout: RowLayout
    """How packed rows are given to the model."""
    parameters: Mapping[str, nn.Parameter]
    """What is trained, by name."""
    optimizer: torch.optim.Optimizer
    summary: ModelSummary
    fingerprints: Mapping[str, Any]
    """Of the weights as they were loaded."""
    rounding: Rounding | None
    """What layers round with, in quantization-aware training."""


def build(recipe: Recipe, base: Base, meta: PreTrainedModel, start: Path | None, process: Process) -> Built:
    """Load the base, put an adapter on it (fresh, or the one in `start`), and make it ready for training.

    `meta` is the base without weights. All ranks call this.
    """
    device, mesh = process.device, process.mesh
    split = adapter.build_initialization(meta, recipe.adapter, seed=recipe.training.seed)
    shares = None
    if mesh is not None:
        offload = recipe.distributed.cpu_offload
        whole = adapter.needed_whole(meta, recipe.adapter, grown=base.additions != Additions())
        shares = Shares(world=process.world, mesh=mesh, device=device, offload=offload, whole=whole)
    plan = qat.plan_rounding(meta, recipe.training.qat, recipe.quantization, recipe.adapter, base.stored)
    model, summary, packed = _load(recipe, base, device, split, start, shares, process.world, plan)
    rounding = None if plan is None else qat.round_layers(model, plan, dtype=DTYPES[recipe.training.precision])
    process.observer.model(summary)
    root = Root(model)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    if recipe.training.activation_checkpointing:
        recompute_blocks(inner)
    if recipe.training.compile:
        process.phase("compiling: the first steps take longer, up to minutes")
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
    prints: dict[str, Any] = {PACKED: packed}
    if split is not None:
        prints["the weights that the adapter's share was taken out of"] = dict(sorted(split.dense_digests.items()))
    return Built(
        model=model,
        root=root,
        loss=loss,
        layout=layout,
        parameters=parameters,
        optimizer=build_optimizer(parameters, recipe.training),
        summary=summary,
        fingerprints=prints,
        rounding=rounding,
    )


def _load(
    recipe: Recipe,
    base: Base,
    device: torch.device,
    split: Initialization | None,
    start: Path | None,
    shares: Shares | None,
    world: World,
    plan: qat.RoundingPlan | None,
) -> tuple[PeftModel, ModelSummary, str]:
    """The base with an adapter, fresh or from `start`, what to say of it, and the fingerprint of its packed weights."""
    begun = time.perf_counter()
    dtype = DTYPES[recipe.training.precision]
    with measure_peak(device) as peak:
        stored = recipe.quantization if plan is None else plan.stored
        model = load_model(base, stored, compute_dtype=dtype, device=device, initialization=split, shares=shares)
    rows = module_table(model)  # before the adapter changes the modules' names
    packed = world.broadcast(packed_fingerprint(model, counts=world.main))
    peft_model = adapter.attach(
        model,
        recipe.adapter,
        base_name=base.source,
        seed=recipe.training.seed,
        initialization=split,
        rounds=plan is not None,
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
        targets=adapter.adapted_layers(peft_model, recipe.adapter),
        peak_bytes=peak.nbytes,
        seconds=time.perf_counter() - begun,
    )
    return peft_model, summary, packed
