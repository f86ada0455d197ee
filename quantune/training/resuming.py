"""Going on with a run: which checkpoint, whether it is still the same run, and its state put back."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from quantune.checkpoint.fingerprint import environment, file_hash, hash_files
from quantune.checkpoint.identity import TOKENS, Identity, go_on, require_same
from quantune.checkpoint.run_folder import RunFolder
from quantune.checkpoint.state import read_identity, restore
from quantune.data.prepare import RunData
from quantune.distributed.world import World
from quantune.errors import CheckpointError
from quantune.model.base import Base
from quantune.recipe.resolve import to_dict
from quantune.recipe.schema import Recipe, SourceConfig
from quantune.training.loop import Progress
from quantune.training.observer import Observer
from quantune.training.optimizer import page_state

ROUNDING = ("python", "machine", "versions")
"""Of the environment: what another one of may round otherwise."""


@attrs.frozen(kw_only=True)
class Checkpoint:
    """The checkpoint that a run goes on from."""

    path: Path
    """Its folder, verified by rank 0."""
    identity: Identity
    """The run that wrote it."""
    passed_over: tuple[str, ...]
    """A sentence on each later checkpoint, which is damaged."""


def open_checkpoint(folder: RunFolder, observer: Observer, world: World) -> Checkpoint | None:
    """The latest whole checkpoint, chosen by rank 0 for all; None where none was ever committed.

    Raises:
        CheckpointError: there are some and none is whole, or a rank can't read it; all ranks raise it.
    """
    found: tuple[str | None, str | None, list[str]] = (None, None, [])
    if world.main:
        damaged: list[str] = []
        path = folder.checkpoints.latest_verified(damaged.append)
        none_whole = f"no checkpoint in {folder.path} is whole; --overwrite starts the run again"
        found = (path.name if path else None, none_whole if damaged and path is None else None, damaged)
    name, refusal, damaged = world.broadcast(found)
    for sentence in damaged:
        observer.warning(sentence)
    if refusal is not None:
        raise CheckpointError(refusal)
    if name is None:
        return None
    path = folder.checkpoints.folder / name
    identity, reason = None, None
    try:
        identity = Identity.from_json(read_identity(path))
    except CheckpointError as error:
        reason = str(error)
    for rank, other in enumerate(world.gather(reason)):
        if other is not None:
            of = f"rank {rank}: " if world.size > 1 else ""
            hint = "; all machines must reach one run folder, on a file system that they share" if rank else ""
            raise CheckpointError(f"{of}{other}{hint}")
    assert identity is not None
    return Checkpoint(path=path, identity=identity, passed_over=tuple(damaged))


def identify(
    written: Recipe, resolved: Recipe, base: Base, data: RunData, device: torch.device, world: World
) -> Identity:
    """What makes this run the run it is, as far as it is known before the base is loaded.

    Args:
        written: the recipe as it was given.
        resolved: the same with nothing left open.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    here = environment()
    return Identity(
        written=to_dict(written),
        resolved=to_dict(resolved),
        fingerprints=_fingerprints(base, data, held_out=resolved.data.eval_size is not None),
        sources=_source_files(resolved.data.train),
        environment={key: here[key] for key in ROUNDING} | {"device": where},
        processes=world.size,
    )


def require_same_run(
    checkpoint: Checkpoint, identity: Identity, allow: Collection[str], observer: Observer
) -> Identity:
    """Require that what is about to be loaded is the run of `checkpoint`; returns it with the changes allowed so far.

    Raises:
        ResumeError: see `quantune.checkpoint.identity.go_on`.
    """
    going_on, sentences = go_on(checkpoint.identity, identity, allow=allow, what=checkpoint.path.name)
    for sentence in sentences:
        observer.warning(sentence)
    return going_on


def put_back(
    checkpoint: Checkpoint,
    identity: Identity,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    world: World,
) -> Progress:
    """Require that everything is as it was, now that all is loaded, and put the state back.

    Raises:
        ResumeError: something is not.
        CheckpointError: see `quantune.checkpoint.state.restore`.
    """
    require_same(checkpoint.identity, identity, what=checkpoint.path.name)
    progress = restore(checkpoint.path, parameters=parameters, optimizer=optimizer, seed=seed, world=world)
    page_state(optimizer)
    return Progress(**progress)


def begin_attempt(
    folder: RunFolder, checkpoint: Checkpoint | None, progress: Progress, recipe: Recipe, samples: int, world: World
) -> None:
    """Write into the history that an attempt begins, of a resolved recipe and so many training samples."""
    history = folder.history
    rows = history.rows()
    history.append(
        "attempt",
        number=1 + sum(row["event"] == "attempt" for row in rows),
        process=os.getpid(),
        host=socket.gethostname(),
        processes=world.size,
        resumed=None if checkpoint is None else progress.step,
        versions=environment()["versions"],
        steps=recipe.training.max_steps,
        batch_size=recipe.training.batch_size,
        samples=samples,
        seed=recipe.training.seed,
        shuffle=recipe.data.shuffle,
    )
    for reason in () if checkpoint is None else checkpoint.passed_over:
        history.append("fallback", reason=reason)


def _fingerprints(base: Base, data: RunData, *, held_out: bool) -> dict[str, Any]:
    prints: dict[str, Any] = {TOKENS: data.train.fingerprint()}
    if held_out and data.eval is not None:
        prints["the tokens of the held-out data"] = data.eval.fingerprint()
    if base.folder is not None:
        prints["the files of the base"] = hash_files([*base.folder.glob("*.safetensors"), base.folder / "config.json"])
    else:
        prints["the revision of the base"] = getattr(base.config, "_commit_hash", None)
    prints["the tokenizer"] = _tokenizer_fingerprint(base.tokenizer)
    return prints


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary, special tokens and chat template."""
    document = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _source_files(sources: Collection[SourceConfig]) -> dict[str, str]:
    return {
        f"{Path(source.path).name} of data.train[{index}]": f"sha256 {file_hash(Path(source.path))}"
        for index, source in enumerate(sources)
        if source.path is not None
    }
