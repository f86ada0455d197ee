"""Everything a merge needs before it writes: the base, what was trained, and that the two belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import PreTrainedModel

from quantune.backends.checkpoints import as_stored, in_words
from quantune.checkpoint.fingerprint import hash_files
from quantune.checkpoint.run_folder import PACKED
from quantune.errors import InputError, ModelError
from quantune.merge.request import SPLITTING, MergeRequest, Observer, Setting
from quantune.merge.trained import BASE_FILES, TrainedAdapter, require_same_files
from quantune.merge.updates import AdapterUpdate, Update, WeightedUpdate, load_update, require_plain
from quantune.model.adapter import build_initialization
from quantune.model.base import Base, open_base, skeleton
from quantune.model.device import DTYPES, choose_precision
from quantune.model.initialization import Initialization
from quantune.model.load import plan_base
from quantune.model.qat import RoundingPlan, plan_rounding
from quantune.model.quantizer import QuantizationPlan
from quantune.model.targets import head_names
from quantune.recipe.schema import ModelConfig, QuantizationConfig
from quantune.streaming.mapping import Unit, checkpoint_name
from quantune.streaming.source import base_folder

REVISION = "the revision of the base"


@attrs.frozen(kw_only=True, eq=False)
class Opened:
    """A base and what was trained on it."""

    setting: Setting
    base: Base
    folder: Path
    """Where the base's files are."""
    model: PreTrainedModel
    """The base on the meta device."""
    update: Update
    tied: bool
    """Whether embedding and output head are one weight in the base."""
    untied: bool
    """Whether they are two afterwards."""
    plan: QuantizationPlan | None
    """How the base was packed; None where it was not."""
    format: QuantizationPlan | None
    """What a packed merge packs, and what was rounded to: as `plan`, but that `[training.qat]` leaves weights dense."""
    rounding: RoundingPlan | None
    """What was rounded in training."""
    initialization: Initialization | None
    """What took the adapter's share out of the base."""
    dtype: torch.dtype
    """What the base was computed in."""
    device: torch.device
    """Where weights are packed and added."""


def open_merge(request: MergeRequest, device: torch.device, observer: Observer) -> Opened:
    """Read everything but the base's weights.

    Raises:
        InputError: the adapter or the base can't be used, or have other shapes than each other.
    """
    setting = request.setting
    observer.phase("opening the base")
    _require_packer(setting.model)
    base = open_base(setting.model, setting.quantization, allow_remote_code=request.trust_remote_code)
    folder = base_folder(base)
    observer.phase("reading the adapter")
    update = _updates(request, base, device)
    model = skeleton(base)
    tied = _is_tied(model)
    dtype = DTYPES[choose_precision(setting.precision, device)]  # type: ignore[arg-type]  # a precision of a recipe
    split = None if setting.adapter is None else build_initialization(model, setting.adapter, seed=setting.seed)
    rounding = None
    if setting.adapter is not None:
        rounding = plan_rounding(model, setting.qat, base.quantization, setting.adapter, base.stored)

    def planned(quantization: QuantizationConfig | None) -> QuantizationPlan | None:
        return None if quantization is None else plan_base(base, quantization, dtype, device, initialization=split)

    packed = planned(base.quantization)
    return Opened(
        setting=setting,
        base=base,
        folder=folder,
        model=model,
        update=update,
        tied=tied,
        untied=tied and not _stays_tied(update, model),
        plan=packed if rounding is None else planned(rounding.stored),
        format=packed,
        rounding=rounding,
        initialization=split,
        dtype=dtype,
        device=device,
    )


def require_same_base(opened: Opened, request: MergeRequest, observer: Observer) -> None:
    """Require that the base is the one that the adapters were trained on, by the hashes of its files.

    Raises:
        ModelError: it is not.
    """
    if request.force:
        observer.warning("--force: nobody looked whether this is the base that was trained on; merge.json says so too")
        return
    if any(BASE_FILES in trained.fingerprints for trained in request.adapters):
        observer.phase("comparing the base with the one that was trained on")
    for trained in request.adapters:
        _require_same(trained, opened.base, opened.folder, observer, packs=request.onto == "dequantized")


def require_places(opened: Opened, found: Sequence[Unit]) -> None:
    """Require that the checkpoint has every weight that the adapter changes.

    Raises:
        ModelError: it lacks one.
    """
    there = {name for unit in found for name in unit.parameters}
    if opened.tied:
        there.update(end_names(opened.model))
    missing = sorted(opened.update.names() - there)
    if missing:
        raise ModelError(f"the adapter changes {missing[0]}, which the files of {opened.base.name} do not have")


def with_head(found: Sequence[Unit], model: PreTrainedModel) -> list[Unit]:
    """The units, the output head among them as a weight of its own, from the embedding that it was tied to.

    A checkpoint may have stored it as well; transformers tied it to the embedding all the same.
    """
    inner, outer = end_names(model)
    stored = {unit.parameters: unit for unit in found if unit.parameters in ((inner,), (outer,))}
    tied = stored.get((inner,)) or stored[(outer,)]  # the embedding's, where both are there
    ends = [attrs.evolve(tied, parameters=(name,), written_as=checkpoint_name(model, name)) for name in (inner, outer)]
    return [*(unit for unit in found if unit.parameters not in stored), *ends]


def end_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the weights of the embedding and of the output head."""
    embedding = model.get_input_embeddings()
    (inner,) = [name for name, module in model.named_modules() if module is embedding]
    (outer,) = head_names(model)
    return f"{inner}.weight", f"{outer}.weight"


def _updates(request: MergeRequest, base: Base, device: torch.device) -> Update:
    taken = request.setting.adapter is not None and request.setting.adapter.init in SPLITTING
    loaded = [load_update(skeleton(base), adapter.folder, device, share_taken=taken) for adapter in request.adapters]
    if len(loaded) == 1 and request.weights == (1.0,):
        return loaded[0]
    for update, adapter in zip(loaded, request.adapters, strict=True):
        require_plain(update, adapter.folder)
        if update.experts.keys() != loaded[0].experts.keys():
            raise ModelError(
                "several adapters on experts can be merged where all have the same target_parameters, and the one in "
                f"{adapter.folder} has others than the first; merge it alone"
            )
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


def _require_same(adapter: TrainedAdapter, base: Base, folder: Path, observer: Observer, *, packs: bool) -> None:
    """See `require_same_base`; `packs`: the merge will compare what the base packs to."""
    revision = adapter.fingerprints.get(REVISION)
    here = getattr(base.config, "_commit_hash", None)
    if revision is not None and here is not None and revision != here:
        raise ModelError(
            f"the adapter in {adapter.folder} was trained on revision {revision} of {base.name}, and this is {here}; "
            "name the right base with --base; --force merges all the same"
        )
    then = adapter.fingerprints.get(BASE_FILES)
    if isinstance(then, Mapping):
        require_same_files(adapter, hash_files([folder / "config.json"]))  # quick, before all of it is read
        require_same_files(adapter, hash_files(folder.glob("*.safetensors")))
    elif (revision is None or here is None) and not (packs and PACKED in adapter.fingerprints):
        named = adapter.base_named()
        other = "" if named in (None, base.name, base.source) else f", and the adapter itself names {named}"
        observer.warning(
            f"nothing but its shapes says that {base.name} is the base that the adapter in {adapter.folder} was "
            f"trained on{other}"
        )


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _stays_tied(update: Update, model: PreTrainedModel) -> bool:
    """Whether embedding and output head, one weight in the base, are one still."""
    ends = end_names(model)
    changed = update.names().intersection(ends)
    if not changed:
        return True
    if len(changed) == 1 or not isinstance(update, AdapterUpdate):
        return False
    inner, outer = ends
    if update.replaced.keys() >= {inner, outer}:
        return torch.equal(update.replaced[inner], update.replaced[outer])
    if update.rows.keys() >= {inner, outer}:
        return all(map(torch.equal, update.rows[inner], update.rows[outer]))
    return False


def require_onto(opened: Opened, onto: str) -> None:
    """Require that there is what is to be merged onto.

    Raises:
        InputError: the base has no other weights than those that were trained on, or nothing was packed.
    """
    if onto == "original" and opened.base.stored is not None:
        raise InputError(
            f"--onto original: {opened.base.name} itself is quantized ({in_words(opened.base.stored)}), so there are "
            "no other weights than those that were trained on; use --onto dequantized"
        )
    if onto == "packed" and opened.format is None:
        raise InputError(
            "--onto packed: the adapter was trained on an unquantized base, so there is no format to pack into; merge "
            "onto it as it is and pack the result with quantune quantize"
        )
