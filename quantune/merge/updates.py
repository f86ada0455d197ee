"""What an adapter changes, weight by weight.

The adapter is loaded by PEFT over the model on the meta device, and PEFT's own layers merge: each is given the one
weight it is about, in fp32, and lets it go. So whatever PEFT knows (rank and alpha patterns, rsLoRA, DoRA, layers that
are stored transposed) is merged as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.backends.kernels import is_finite
from quantune.errors import ModelError
from quantune.model.adapter import NAME, adapter_tensors, custom_modules, require_adapter
from quantune.model.lora_experts import ParamWrapper
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
    rows: Mapping[str, tuple[Tensor, Tensor]]
    """Embeddings of which single rows were trained: which, and what they are."""

    def names(self) -> frozenset[str]:
        parts = (self.layers, self.experts, self.biases, self.replaced, self.rows)
        return frozenset(name for part in parts for name in part)

    @torch.no_grad()
    def apply(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        if name in self.replaced:
            weight = self.replaced[name].to(weight.device, torch.float32).clone()
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


def load_update(model: PreTrainedModel, folder: Path, device: torch.device) -> AdapterUpdate:
    """The adapter in `folder`; `model`, the base on the meta device, is of no other use afterwards.

    Raises:
        ModelError: it is no adapter, holds pickles or NaN, or was trained on another architecture.
    """
    require_adapter(folder)
    tensors = adapter_tensors(folder)
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ModelError(
            f"the adapter in {folder} holds NaN or infinity in {len(broken)} of its tensors, e.g. {broken[0]}; "
            "nothing was merged. Train it again, or merge an earlier one"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config._register_custom_module(custom_modules(model))
        config.inference_mode = True
        if isinstance(config.init_lora_weights, str):  # the base is given without the adapter's share
            config.init_lora_weights = True
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
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            stand_in = nn.Parameter(nothing.expand(base.get_parameter(leaf).shape), requires_grad=False)
            base.register_parameter(leaf, stand_in)
            placed.add(id(stand_in))
    return placed


def _read(adapted: PeftModel, config: LoraConfig, stand_ins: set[int]) -> AdapterUpdate:
    layers: dict[str, LoraLayer] = {}
    experts: dict[str, ParamWrapper] = {}
    biases: dict[str, LoraLayer] = {}
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    inner = adapted.get_base_model()
    for path, module in inner.named_modules():
        name = _plain(path)
        if isinstance(module, ParamWrapper):
            experts[f"{name}.{module.parameter_name}"] = module
        elif isinstance(module, LoraLayer):
            layers[f"{name}.weight"] = module
            if module.lora_bias.get(NAME):
                biases[f"{name}.bias"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            for leaf, parameter in module.modules_to_save[NAME].named_parameters():
                replaced[f"{name}.{leaf}"] = parameter.detach()
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
    return AdapterUpdate(config=config, layers=layers, experts=experts, biases=biases, replaced=replaced, rows=rows)


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
