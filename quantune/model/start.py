"""Training on from an adapter that is there already.

Before any weight is loaded the adapter is compared with the one that the recipe asks for, by its configuration and by
the name and shape of every tensor; afterwards its tensors are copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from quantune.errors import ModelError
from quantune.model.adapter import NAME, adapter_tensors, attach, require_adapter
from quantune.model.targets import match_parameters
from quantune.recipe.schema import AdapterConfig

KEYS = {
    "r": "r",
    "lora_alpha": "alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
}
"""What `[adapter]` calls the keys of `adapter_config.json`."""
FREE = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("lora_dropout", "runtime_config", "ensure_weight_tying"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Keys that may differ: where the adapter comes from, how it was trained, how it began (looked at apart), and which
layers it covers, which its tensors say."""
UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initializations that leave the base as it was."""


def check_start(
    folder: Path, skeleton: PreTrainedModel, config: AdapterConfig, added_tokens: Mapping[str, int] | None = None
) -> None:
    """Require that the adapter in `folder` is of the kind that `config` asks for.

    `skeleton`, the base on the meta device, gets an adapter and is of no use afterwards. `added_tokens` are those that
    the recipe adds to the vocabulary, with their ids: their rows are in the adapter.

    Raises:
        ModelError: it is no adapter, or another one; names every difference and what to write.
    """
    require_adapter(folder)
    saved = _read_config(folder)
    _require_whole_base(folder, saved)
    wanted_parameters = match_parameters(skeleton, config.target_parameters)
    same_parameters = _covers(skeleton, saved.get("target_parameters") or (), wanted_parameters)
    model = attach(skeleton, config, base_name="", seed=0)
    wanted = _plain(model.peft_config[NAME].to_dict())
    differing = [key for key in sorted(saved) if key not in FREE and not _same(saved[key], wanted.get(key))]
    if same_parameters:
        differing = [key for key in differing if key != "target_parameters"]
    problems = [_difference(key, saved.get(key), wanted.get(key)) for key in differing]
    expected = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    problems += _tensor_problems(
        _shapes(folder), {name: tuple(tensor.shape) for name, tensor in expected.items()}, saved, bool(problems)
    )
    problems += _token_problems(folder, added_tokens or {})
    if problems:
        raise ModelError(
            f"[adapter] start_from: the adapter in {folder} is not the one that this table asks for: "
            f"{'; '.join(problems)}"
        )


def load_start(model: PeftModel, folder: Path) -> None:
    """Copy the tensors of the adapter in `folder`, which `check_start` has looked at, into the adapter on `model`.

    Raises:
        ModelError: they do not fit after all: the folder has changed.
    """
    try:
        loaded: Any = set_peft_model_state_dict(model, adapter_tensors(folder), adapter_name=NAME)
    except RuntimeError as error:
        raise ModelError(f"[adapter] start_from: the adapter in {folder} does not fit the base: {error}") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained.intersection(loaded.missing_keys))
    if missing or loaded.unexpected_keys:
        found = [*missing, *loaded.unexpected_keys][0]
        raise ModelError(f"[adapter] start_from: the adapter in {folder} does not fit the base, e.g. {found}")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"[adapter] start_from: {folder / 'adapter_config.json'} can't be read: {error}") from error
    kind = saved.get("peft_type") if isinstance(saved, dict) else None
    if kind != "LORA":
        raise ModelError(
            f"[adapter] start_from: expected a LoRA adapter in {folder}, found peft_type = {json.dumps(kind)}"
        )
    return {**_plain(LoraConfig().to_dict()), **saved}  # what an older PEFT did not write has the default


def _require_whole_base(folder: Path, saved: Mapping[str, Any]) -> None:
    """Refuse an adapter that began with a share of the base: without that share the base is another one."""
    init = saved.get("init_lora_weights", True)
    if init in UNCHANGED_BASE:
        try:  # what a LoftQ adapter of a run says in PEFT's format does not tell; its recipe does
            recipe = tomli.loads((folder.parent / "recipe.toml").read_text(encoding="utf-8"))
            init = recipe.get("adapter", {}).get("init", "default")
        except (OSError, ValueError, AttributeError):
            return  # not the adapter of a run
        if init in ("default", *UNCHANGED_BASE):
            return
    raise ModelError(
        f"[adapter] start_from: the adapter in {folder} began with init = {json.dumps(init)}, so it belongs to a base "
        "that a share was taken out of; start from one that began at zero"
    )


def _covers(skeleton: PreTrainedModel, suffixes: Iterable[str], wanted: list[str]) -> bool:
    try:
        return match_parameters(skeleton, suffixes) == wanted
    except ModelError:  # a weight that this base does not have
        return False


def _same(saved: Any, wanted: Any) -> bool:
    """Whether two values of a configuration say the same, whatever the order of a list and the kind of nothing."""
    if isinstance(saved, list) and isinstance(wanted, list):
        return sorted(map(str, saved)) == sorted(map(str, wanted))
    return (saved or None) == (wanted or None)


def _difference(key: str, saved: Any, wanted: Any) -> str:
    there, here = json.dumps(saved), json.dumps(wanted)
    if key not in KEYS:
        return f"{key} is {there} there, for which quantune has no key"
    ours = KEYS[key]
    if saved is None:
        return f"{ours} is not set there, {here} here (leave {ours} out)"
    return f"{ours} is {there} there, {here} here (write {ours} = {there})"


def _tensor_problems(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, Any],
    explained: bool,
) -> list[str]:
    """Sentences on layers that only one of the two adapters has, or, where that is all, on shapes."""
    there, here = _layers(found), _layers(expected)
    if there != here:
        only = [f"only the adapter has {min(there - here)}"] if there - here else []
        only += [f"only this table has {min(here - there)}"] if here - there else []
        targets = saved.get("target_modules")
        return [f"targets covers other layers there ({', '.join(only)}; write targets = {json.dumps(targets)})"]
    if explained:
        return []
    if found.keys() != expected.keys():
        return [f"its tensors are others, e.g. {min(found.keys() ^ expected.keys())}"]
    return [
        f"{name} has the shape {list(found[name])} there, {list(expected[name])} here: it was trained on another base"
        for name in [name for name in sorted(found) if found[name] != expected[name]][:1]
    ]


def _token_problems(folder: Path, added: Mapping[str, int]) -> list[str]:
    """A sentence on the first token whose row is another token's in the adapter; a run saves its tokenizer with it."""
    file = folder / "tokenizer.json"
    if not added or not file.is_file():
        return []
    try:
        there = {
            token["id"]: token["content"] for token in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"[adapter] start_from: {file} can't be read: {error!r}") from error
    return [
        f"the row of the added token {json.dumps(token)} is that of {json.dumps(there[index])} there (add the same "
        "tokens to [model] in the same order)"
        for token, index in added.items()
        if there.get(index, token) != token
    ][:1]


def _layers(names: Iterable[str]) -> set[str]:
    """The adapted layers that tensors belong to; the wrappers of several weights of one module count as one layer."""
    layers = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    return {layer.removesuffix(".base_layer").removeprefix("base_model.model.") for layer in layers}


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"[adapter] start_from: {folder / 'adapter_model.safetensors'} can't be read: {error}"
        ) from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration as it is written to a file."""
    return json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
