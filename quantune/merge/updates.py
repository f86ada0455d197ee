"""What an adapter changes, weight by weight.

The adapter is loaded by PEFT over the model on the meta device, and PEFT's own layers merge: each is given the one
weight it is about, in fp32, and lets it go. So whatever PEFT knows (rank and alpha patterns, rsLoRA, DoRA, layers that
are stored transposed) is merged as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.backends.kernels import is_finite
from quantune.errors import ModelError
from quantune.model.adapter import NAME, adapter_tensors, custom_modules, require_adapter
from quantune.model.lora_experts import ParamWrapper
from quantune.model.start import UNCHANGED_BASE
from quantune.quantized.experts import is_experts
from quantune.quantized.merged import lora_delta

MARKS = ("lora_", "modules_to_save", "trainable_tokens_")
"""Parts of the names of parameters that are PEFT's own."""


class Update(Protocol):
    """What is done to the weights of a model."""

    def names(self) -> frozenset[str]:
        """The parameters that change."""

    def apply(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        """A weight as it is with the update, fp32. `weight` is fp32 and may be changed in place.

        Of fused experts it is given one, as (out features, in features).
        """


@attrs.frozen(kw_only=True, eq=False)
class AdapterUpdate:
    """One adapter, as PEFT merges it."""

    config: LoraConfig
    layers: Mapping[str, LoraLayer]
    """By the weight that each adapts."""
    experts: Mapping[str, ParamWrapper]
    """By the fused weight that each adapts."""
    biases: Mapping[str, LoraLayer]
    """Layers whose update has a bias of its own, by the bias they are added to."""
    replaced: Mapping[str, Tensor]
    """Parameters that were trained in full."""
    transposed: frozenset[str]
    """Those of them that are fused experts, (experts, in features, out features)."""
    rows: Mapping[str, tuple[Tensor, Tensor]]
    """Embeddings of which single rows were trained: which, and what they are."""

    def names(self) -> frozenset[str]:
        parts = (self.layers, self.experts, self.biases, self.replaced, self.rows)
        return frozenset(name for part in parts for name in part)

    @torch.no_grad()
    def apply(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        if name in self.replaced:
            trained = self.replaced[name] if expert is None else self.replaced[name][expert]
            weight = (trained.T if name in self.transposed else trained).to(weight, copy=True)
        if name in self.rows:
            indices, values = self.rows[name]
            weight[indices] = values.to(weight)
        if name in self.biases:
            layer: Any = self.biases[name]
            weight += (layer.lora_B[NAME].bias * layer.scaling[NAME]).to(weight)
        if name in self.experts:
            assert expert is not None
            update = self.experts[name].update_of(NAME)
            factors = update.lora_A[expert].to(weight), update.lora_B[expert].to(weight)
            weight += lora_delta(*factors, update.scaling)  # rounded as rounded training rounds it
        return _merged(self.layers[name], weight) if name in self.layers else weight


@attrs.frozen(kw_only=True, eq=False)
class WeightedUpdate:
    """Several plain LoRA adapters at once, each times a number."""

    parts: Sequence[tuple[AdapterUpdate, float]]

    def names(self) -> frozenset[str]:
        return frozenset().union(*(part.names() for part, _ in self.parts))

    @torch.no_grad()
    def apply(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        total = torch.zeros_like(weight)
        for part, factor in self.parts:
            if name in part.names():
                total.add_(part.apply(name, torch.zeros_like(weight), expert), alpha=factor)
        return weight.add_(total)


def load_update(
    model: PreTrainedModel, folder: Path, device: torch.device, *, share_taken: bool = False
) -> AdapterUpdate:
    """The adapter in `folder`; `model`, the base on the meta device, is of no other use afterwards.

    Args:
        share_taken: the base is given without the share of it that the adapter began with.

    Raises:
        ModelError: it is no LoRA adapter that can be merged, holds pickles or NaN, began with a share of the base that
            is still in it, or was trained on another architecture.
    """
    require_adapter(folder)
    config = _read_config(folder, share_taken)
    tensors = adapter_tensors(folder)
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ModelError(
            f"the adapter in {folder} holds NaN or infinity in {len(broken)} of its tensors, e.g. {broken[0]}; "
            "nothing was merged. Train it again, or merge an earlier one"
        )
    try:
        config._register_custom_module(custom_modules(model))
        config.inference_mode = True
        config.init_lora_weights = True  # whatever it began with, its tensors are loaded
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        stand_ins = _place(adapted, device)
        loaded: Any = set_peft_model_state_dict(
            adapted, {name: tensor.to(device) for name, tensor in tensors.items()}, NAME, low_cpu_mem_usage=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the adapter in {folder} was trained on another base: {_first_line(error)}") from error
    own = {name for name, parameter in adapted.named_parameters() if any(mark in name for mark in MARKS)}
    missing = sorted(own.intersection(loaded.missing_keys))
    if missing or loaded.unexpected_keys:
        what = f"it lacks {missing[0]}" if missing else f"the base has no place for {loaded.unexpected_keys[0]}"
        raise ModelError(f"the adapter in {folder} was trained on another base: {what}")
    return _read(adapted, config, stand_ins)


def _read_config(folder: Path, share_taken: bool) -> LoraConfig:
    """The configuration of an adapter that can be merged.

    Raises:
        ModelError: it can't be.
    """
    file = folder / "adapter_config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} can't be read: {_first_line(error)}") from error
    if config is None:
        raise ModelError(f"expected a LoRA adapter in {folder}, found peft_type = {json.dumps(kind)}; PEFT merges it")
    if config.alora_invocation_tokens is not None:
        raise ModelError(
            f"the adapter in {folder} is an aLoRA, which acts on a part of a text only and can't be merged"
        )
    init = config.init_lora_weights
    if not share_taken and init not in UNCHANGED_BASE:
        raise ModelError(
            f"the adapter in {folder} began with init_lora_weights = {json.dumps(init)}, which takes a share out of "
            "the base, and nothing says how: name the recipe of its run with --recipe, or let PEFT convert it into one "
            "that began at zero (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def require_plain(update: AdapterUpdate, folder: Path) -> None:
    """Require that an adapter is plain LoRA, which can be added up.

    Raises:
        ModelError: it is not; says what else it holds.
    """
    others = {
        "use_dora": update.config.use_dora,
        "modules_to_save": bool(update.replaced) and bool(update.config.modules_to_save),
        "bias": update.config.bias != "none" or bool(update.biases),
        "trainable_token_indices": bool(update.rows),
    }
    found = [name for name, there in others.items() if there]
    if found:
        raise ModelError(
            f"several adapters can be merged where all are plain LoRA, and the one in {folder} has {', '.join(found)}; "
            "merge it alone"
        )


def _place(adapted: PeftModel, device: torch.device) -> set[int]:
    """Let adapted weights seem to be fp32 on `device`, where PEFT then puts the adapter; they take no memory.

    Returns their identities.
    """
    nothing = torch.zeros((), device=device)
    placed = set()
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer | TrainableTokensLayer):
            base: Any = layer.get_base_layer()
            leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            stand_in = nn.Parameter(nothing.expand(base.get_parameter(leaf).shape), requires_grad=False)
            base.register_parameter(leaf, stand_in)
            placed.add(id(stand_in))
        if isinstance(layer, TrainableTokensLayer):
            originals: Any = layer.trainable_tokens_original  # rows of the base, which merging does not look at
            for name, rows in list(originals.items()):
                originals[name] = torch.zeros(rows.shape, device=device)
    return placed


def _read(adapted: PeftModel, config: LoraConfig, stand_ins: set[int]) -> AdapterUpdate:
    layers: dict[str, LoraLayer] = {}
    experts: dict[str, ParamWrapper] = {}
    biases: dict[str, LoraLayer] = {}
    replaced: dict[str, Tensor] = {}
    transposed: set[str] = set()
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    inner = adapted.get_base_model()
    for path, module in inner.named_modules():
        name = _plain(path)
        if isinstance(module, ParamWrapper):
            experts[f"{name}.{module.parameter_name}"] = module
        elif isinstance(module, LoraLayer):
            layers[f"{name}.weight"] = module
            if module.lora_bias.get(NAME):
                _require_bias(module, name)
                biases[f"{name}.bias"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[NAME]
            for leaf, parameter in trained.named_parameters():
                replaced[f"{name}.{leaf}"] = parameter.detach()
                owner = trained.get_submodule(leaf.rpartition(".")[0])
                if is_experts(owner) and owner.is_transposed and parameter.dim() == 3:
                    transposed.add(f"{name}.{leaf}")
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            rows[f"{name}.weight"] = (
                torch.tensor(tokens.token_indices[NAME]),
                tokens.trainable_tokens_delta[NAME].detach(),
            )
    for path, parameter in inner.named_parameters():
        own = any(mark in path for mark in MARKS)
        if not parameter.is_meta and not own and id(parameter) not in stand_ins:
            replaced[_plain(path)] = parameter.detach()  # a bias
    return AdapterUpdate(
        config=config,
        layers=layers,
        experts=experts,
        biases=biases,
        replaced=replaced,
        transposed=frozenset(transposed),
        rows=rows,
    )


def _require_bias(layer: LoraLayer, name: str) -> None:
    base: Any = layer.get_base_layer()
    if getattr(base, "bias", None) is None:
        raise ModelError(f"the adapter adds a bias to {name}, which has none in this base, so that it can't be merged")


def _merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight as PEFT's layer makes it, given to its base for the moment."""
    base: Any = layer.get_base_layer()
    with _lent(base, weight):
        layer.merge(adapter_names=[NAME])  # type: ignore[operator]  # every kind of layer has it
        layer.merged_adapters.clear()
        layer._caches.clear()  # type: ignore[operator]  # norms that undoing it would need
        return base.weight.data


class _lent:
    """Give a module a weight, and zeros for a bias, and take them away again."""

    def __init__(self, module: Any, weight: Tensor) -> None:
        self.module = module
        self.before = dict(module.named_parameters(recurse=False))
        self.given = {"weight": weight}
        if "bias" in self.before:
            self.given["bias"] = weight.new_zeros(self.before["bias"].shape)

    def __enter__(self) -> None:
        for name, tensor in self.given.items():
            self.module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def __exit__(self, *error: object) -> None:
        for name in self.given:
            self.module.register_parameter(name, self.before[name])


def _plain(path: str) -> str:
    """The name in the base of a module or parameter of the adapted model."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
