"""From an adapter and its base to a merged checkpoint, told in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from transformers import PreTrainedModel

from quantune.backends.checkpoints import as_stored, in_words
from quantune.checkpoint.fingerprint import environment, hash_files
from quantune.checkpoint.run_folder import PACKED
from quantune.errors import InputError, ModelError
from quantune.merge.companions import write_companions
from quantune.merge.trained import BASE_FILES, TrainedAdapter, require_same_base
from quantune.merge.updates import AdapterUpdate, Update, WeightedUpdate, load_update, require_plain
from quantune.merge.weights import BaseWeights, Counts, MergeJob, Onto, main_dtype
from quantune.model.adapter import build_initialization
from quantune.model.base import Base, open_base, skeleton
from quantune.model.device import DTYPES, choose_precision
from quantune.model.load import fingerprint_of, plan_base
from quantune.model.qat import plan_rounding
from quantune.model.quantizer import QuantizationPlan
from quantune.model.targets import head_names
from quantune.recipe.schema import AdapterConfig, ModelConfig, QatConfig, QuantizationConfig, Recipe
from quantune.streaming.adopted import AdoptedSource, adopted
from quantune.streaming.mapping import Unit, checkpoint_name, units
from quantune.streaming.output import disk_errors, open_output
from quantune.streaming.rewrite import rewrite
from quantune.streaming.source import base_folder, open_source

REPORT = "merge.json"
"""In a merged folder: what it was made of."""
SPLITTING = ("pissa", "olora", "loftq")
"""Initializations that change the base."""
REVISION = "the revision of the base"


class Observer(Protocol):
    """Is told how a merge goes on."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def begin(self, nbytes: int) -> None:
        """So many bytes will be written."""

    def wrote(self, nbytes: int) -> None:
        """So many more are written."""

    def warning(self, text: str) -> None:
        """Something that the person should know."""


@attrs.frozen(kw_only=True)
class Setting:
    """What an adapter was trained on, as far as it matters to its weights."""

    model: ModelConfig
    quantization: QuantizationConfig | None
    adapter: AdapterConfig | None
    """None for an adapter of another tool."""
    seed: int
    precision: str
    """`fp32`, `bf16`, or `auto` where nobody says."""
    qat: QatConfig | None = None
    """What was rounded in training."""

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        """That of a run."""
        return cls(
            model=recipe.model,
            quantization=recipe.quantization,
            adapter=recipe.adapter,
            seed=recipe.training.seed,
            precision=recipe.training.precision,
            qat=recipe.training.qat,
        )

    @classmethod
    def of_another_tool(cls, adapter: TrainedAdapter, base: str | None) -> Setting:
        """That of an adapter whose folder holds no recipe: the base as it is.

        Raises:
            InputError: nobody says which base that is.
        """
        named = base or adapter.base_named()
        if named is None:
            raise InputError(
                f"the adapter in {adapter.folder} does not say which base it was trained on; name it with --base"
            )
        return cls(model=ModelConfig(base=named), quantization=None, adapter=None, seed=0, precision="auto")


def require_one_setting(settings: Sequence[Setting]) -> Setting:
    """What all adapters were trained on.

    Raises:
        InputError: it is not the same for all.
    """
    first = settings[0]
    for other in settings[1:]:
        for name in ("model", "quantization", "precision", "qat"):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"expected adapters that were trained on the same base in the same way, found another [{name}] for "
                    "two of them; merge each alone"
                )
    if len(settings) > 1 and any(one.adapter is not None and one.adapter.init in SPLITTING for one in settings):
        raise InputError(
            "several adapters can be merged where all began at zero, and one began with a share of the base "
            f"(init = {', '.join(SPLITTING)}); merge it alone"
        )
    return first


@attrs.frozen(kw_only=True)
class MergeRequest:
    """What is to be merged, and how."""

    adapters: tuple[TrainedAdapter, ...]
    weights: tuple[float, ...]
    """What each adapter's update is multiplied with."""
    setting: Setting
    out: Path
    onto: Onto = "dequantized"
    dtype: torch.dtype | None = None
    """What weights are written in; None for what the base has them in."""
    max_shard_size: str | None = None
    force: bool = False
    """Merge although the base is not the one that was trained on."""
    overwrite: bool = False
    trust_remote_code: bool = False


@attrs.frozen(kw_only=True)
class MergeResult:
    """A merged checkpoint."""

    folder: Path
    merged: int
    """Weights that the adapter changed."""
    dequantized: int
    """Weights that are only what packing made of them."""
    kept: int
    """Tensors that are as they were."""
    nbytes: int
    seconds: float
    dtype: str
    verification: Any
    """What comparing it with base and adapter gave; None where that was not asked for."""


Verify = Callable[[Path], Any]
"""Compares the model in a folder with base and adapter as trained, and raises where it is another one."""


def merge(request: MergeRequest, device: torch.device, observer: Observer, verify: Verify | None = None) -> MergeResult:
    """Write base and adapters as one checkpoint.

    Args:
        device: where weights are packed and added.
        verify: is given the folder before it has its name.

    Raises:
        InputError: the adapter, the base or the folder can't be used, or they don't belong together.
        QuantuneError: see `quantune.errors`.
    """
    begun = time.perf_counter()
    setting = request.setting
    observer.phase("opening the base")
    _require_packer(setting.model)
    base = open_base(setting.model, setting.quantization, allow_remote_code=request.trust_remote_code)
    folder = base_folder(base)
    if request.onto == "original" and base.stored is not None:
        raise InputError(
            f"--onto original: {base.name} itself is quantized ({in_words(base.stored)}), so there are no other "
            "weights than those that were trained on; use --onto dequantized"
        )
    if not request.force:
        observer.phase("comparing the base with the one that was trained on")
        for trained in request.adapters:
            _require_same(trained, base, folder)
    observer.phase("reading the adapter")
    update = _updates(request, base, device)
    meta = skeleton(base)
    tied = _is_tied(meta)
    untied = tied and not _stays_tied(update, meta)
    dtype = DTYPES[choose_precision(setting.precision, device)]  # type: ignore[arg-type]  # a precision of a recipe
    split = None if setting.adapter is None else build_initialization(meta, setting.adapter, seed=setting.seed)
    rounds = None
    if setting.adapter is not None:
        rounds = plan_rounding(meta, setting.qat, base.quantization, setting.adapter, base.stored)

    def planned(quantization: QuantizationConfig | None) -> QuantizationPlan | None:
        if quantization is None:
            return None
        return plan_base(base, quantization, dtype, device, initialization=split, pack_dtype=dtype)

    plan = planned(base.quantization if rounds is None else rounds.stored)
    identity = _identity(request, base, folder)
    with (
        open_output(request.out, report=REPORT, identity=identity, overwrite=request.overwrite) as output,
        open_source(folder) as stored,
    ):
        if output.resumed:
            observer.warning(f"going on with {output.partial.name}: {len(output.complete)} files of it are complete")
        source = stored if base.stored is None or plan is None else adopted(stored, meta, plan)
        weights = BaseWeights.of(
            meta,
            plan,
            split,
            dtype,
            device,
            rounded=frozenset() if rounds is None else rounds.parameters,
            rounding=None if rounds is None else planned(rounds.format),
        )
        job = MergeJob(
            source=source,
            base=weights,
            update=update,
            changed=update.names(),
            onto=request.onto,
            additions=base.additions,
            dtype=request.dtype,
            main_dtype=main_dtype(stored),
            quantized=frozenset(source.packed) if isinstance(source, AdoptedSource) else frozenset(),
            counts=Counts(),
        )
        found = units(meta, source.specs)
        _require_places(update, found, tied, base)
        if untied:
            found.append(_head(found, meta))
        observer.phase("merging")
        nbytes = rewrite(source, found, job, output, observer, max_shard_size=request.max_shard_size)
        _compare_packed(request, job.notes, base, observer)
        written = request.dtype or job.main_dtype
        with disk_errors(output.target):
            write_companions(output.partial, base, folder, setting.model, meta, dtype=written, untied=untied)
        verification = None
        if verify is not None:
            observer.phase("verifying")
            verification = verify(output.partial)
        result = MergeResult(
            folder=request.out,
            merged=len(update.names()),
            dequantized=len(weights.packed - update.names()) if request.onto == "dequantized" else 0,
            kept=sum(not any(job.touches(name, unit) for name in unit.parameters) for unit in found),
            nbytes=nbytes,
            seconds=time.perf_counter() - begun,
            dtype=str(written).removeprefix("torch."),
            verification=verification,
        )
        with disk_errors(output.target):
            (output.partial / REPORT).write_text(_report(request, result, identity), encoding="utf-8")
            output.publish()
    return result


def _updates(request: MergeRequest, base: Base, device: torch.device) -> Update:
    loaded = [load_update(skeleton(base), adapter.folder, device) for adapter in request.adapters]
    if len(loaded) == 1 and request.weights == (1.0,):
        return loaded[0]
    for update, adapter in zip(loaded, request.adapters, strict=True):
        require_plain(update, adapter.folder)
    return WeightedUpdate(parts=tuple(zip(loaded, request.weights, strict=True)))


def _require_packer(model: ModelConfig) -> None:
    """Refuse a base that ships quantized in a format that quantune can't pack.

    Raises:
        ModelError: it does; names the format.
    """
    config = Path(model.base) / "config.json"
    try:
        stored = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # no local folder, or one that opening the base complains of
    if isinstance(stored, Mapping) and as_stored(stored) is None:
        raise ModelError(
            f"{model.base} ships quantized ({in_words(stored)}), a format that quantune has no packer for, so nothing "
            "can be merged into it; name the unquantized base with --base"
        )


def _require_same(adapter: TrainedAdapter, base: Base, folder: Path) -> None:
    revision = adapter.fingerprints.get(REVISION)
    here = getattr(base.config, "_commit_hash", None)
    if revision is not None and here is not None and revision != here:
        raise ModelError(
            f"the adapter in {adapter.folder} was trained on revision {revision} of {base.name}, and this is {here}; "
            "name the right base with --base; --force merges all the same"
        )
    then = adapter.fingerprints.get(BASE_FILES)
    if isinstance(then, Mapping):
        config = hash_files([folder / "config.json"])
        require_same_base(adapter, config)  # quick, before all of it is read
        require_same_base(adapter, hash_files(folder.glob("*.safetensors")))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _end_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the weights of the embedding and of the output head."""
    embedding = model.get_input_embeddings()
    (inner,) = [name for name, module in model.named_modules() if module is embedding]
    (outer,) = head_names(model)
    return f"{inner}.weight", f"{outer}.weight"


def _stays_tied(update: Update, model: PreTrainedModel) -> bool:
    """Whether embedding and output head, one weight in the base, are one still."""
    inner, outer = _end_names(model)
    changed = update.names().intersection((inner, outer))
    if not changed:
        return True
    if len(changed) == 1 or not isinstance(update, AdapterUpdate):
        return False
    both = [update.replaced.get(name) for name in (inner, outer)]
    return both[0] is not None and both[1] is not None and torch.equal(both[0], both[1])


def _head(found: Sequence[Unit], model: PreTrainedModel) -> Unit:
    """The output head as a weight of its own, from the embedding that it was tied to."""
    inner, outer = _end_names(model)
    embedding = next(unit for unit in found if unit.parameters == (inner,))
    return attrs.evolve(embedding, parameters=(outer,), written_as=checkpoint_name(model, outer))


def _require_places(update: Update, found: Sequence[Unit], tied: bool, base: Base) -> None:
    """Require that the checkpoint has every weight that the adapter changes."""
    there = {name for unit in found for name in unit.parameters}
    missing = sorted(update.names() - there)
    if tied and missing:
        missing = [name for name in missing if name not in _end_names(skeleton(base))]
    if missing:
        raise ModelError(f"the adapter changes {missing[0]}, which the files of {base.name} do not have")


def _identity(request: MergeRequest, base: Base, folder: Path) -> dict[str, Any]:
    """What must be the same for another process to go on."""
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    return {
        "adapters": {
            f"{adapter.folder} times {weight:g}": adapter.digest()
            for adapter, weight in zip(request.adapters, request.weights, strict=True)
        },
        "base": base.source,
        "files": stats,
        "quantization": None if base.quantization is None else attrs.asdict(base.quantization),
        "model": attrs.asdict(request.setting.model),
        "qat": None if request.setting.qat is None else attrs.asdict(request.setting.qat),
        "onto": request.onto,
        "dtype": str(request.dtype),
        "max_shard_size": request.max_shard_size,
        "versions": environment()["versions"],
    }


def _compare_packed(request: MergeRequest, digests: Mapping[str, str], base: Base, observer: Observer) -> None:
    """Warn where the base packs to other bytes than those that were trained on."""
    then = {adapter.fingerprints.get(PACKED) for adapter in request.adapters} - {None}
    if request.onto != "original" and base.stored is None and digests and then and then != {fingerprint_of(digests)}:
        observer.warning(
            "the base packs to other bytes on this machine than it was trained on; the merged model may differ slightly"
        )


def _report(request: MergeRequest, result: MergeResult, identity: Mapping[str, Any]) -> str:
    document = {
        **{key: identity[key] for key in ("adapters", "base", "quantization", "onto", "versions")},
        "dtype": result.dtype,
        "merged": result.merged,
        "dequantized": result.dequantized,
        "kept": result.kept,
        "verification": None if result.verification is None else attrs.asdict(result.verification),
    }
    return json.dumps(document, indent=1, default=str) + "\n"
