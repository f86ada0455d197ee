"""Which layers and weights an adapter covers."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from quantune.errors import ModelError
from quantune.model.adoption import kept_modules
from quantune.model.load import linear_layers
from quantune.model.quantizer import packable
from quantune.model.vocabulary import Additions
from quantune.quantized import experts
from quantune.recipe.schema import ALL_LINEAR, AdapterConfig, QuantizationConfig

SPLITTING = ("pissa", "olora")
"""Initializations that take the adapter's share out of the weight."""


def match_targets(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Names of the layers that `config.targets` covers: linear layers; in a list also the output head and embeddings.

    Raises:
        ModelError: a target matches nothing, `modules_to_save` names no module, or the regular expression is invalid.
    """
    linears = linear_layers(model)
    taken = _taken_for_experts(model, linears)
    targets = config.targets
    if isinstance(targets, str) and targets != ALL_LINEAR:
        pattern = _compile(targets)
        matched = [name for name in linears if pattern.fullmatch(name)]
        if not matched:
            raise ModelError(_no_match(targets, linears))
    else:
        matched = _match_list(model, (targets,) if isinstance(targets, str) else targets, linears, taken)
    if not matched and not config.target_parameters:
        raise ModelError("[adapter] targets is an empty list, and there are no target_parameters: nothing is trained")
    for leaf in sorted({_leaf(name) for name in matched} & taken):
        raise ModelError(
            f'[adapter] targets: PEFT takes "{leaf}" for the fused weights of this architecture\'s experts; leave it '
            f"out, and name the experts' weights in target_parameters to adapt them"
        )
    _check_full(model, config, matched)
    return matched


def _match_list(model: PreTrainedModel, targets: tuple[str, ...], linears: list[str], taken: set[str]) -> list[str]:
    named = [*linears, *_beside(model)]
    matched = set()
    for target in targets:
        if target == ALL_LINEAR:
            found = [name for name in linears if _leaf(name) not in taken]
        else:
            found = [name for name in named if has_suffix(name, target)]
        if not found:
            raise ModelError(_no_match(target, named if target != ALL_LINEAR else linears))
        matched.update(found)
    return [name for name in named if name in matched]


def _names(config: AdapterConfig, name: str) -> bool:
    """Whether `targets` means a layer that it covers, which `all-linear` does not say of any one."""
    if isinstance(config.targets, str):
        return config.targets != ALL_LINEAR
    return any(target != ALL_LINEAR and has_suffix(name, target) for target in config.targets)


def _check_full(model: PreTrainedModel, config: AdapterConfig, matched: list[str]) -> None:
    """Require that `modules_to_save` names modules, that what is split or trained in full is not shared, and that
    nothing is both adapted and trained in full."""
    names = [name for name, _ in model.named_modules()]
    for module in config.modules_to_save:
        if not any(has_suffix(name, module) for name in names):
            leaves = sorted({_leaf(name) for name in names if name})
            raise ModelError(
                f'[adapter] modules_to_save: expected names of modules, found "{module}", which the model does not '
                f"have{_did_you_mean(module, leaves)}"
            )
    shared = _beside(model) if model.config.get_text_config().tie_word_embeddings else []
    adapted = [name for name in shared if name in matched]
    full = [name for name in shared if any(has_suffix(name, module) for module in config.modules_to_save)]
    if adapted and full:
        raise ModelError(
            f'[adapter] targets covers "{_leaf(adapted[0])}" and modules_to_save "{_leaf(full[0])}", which are one '
            "weight in this base; name them in one of the two"
        )
    for name in matched:
        saved = next((module for module in config.modules_to_save if above(name, module)), None)
        if saved is not None and _names(config, name):
            raise ModelError(
                f'[adapter] targets covers "{name}", which modules_to_save = ["{saved}"] trains in full; name it in '
                "one of the two"
            )
    if config.init in SPLITTING:
        whole = [name for name in _beside(model) if name in matched]
        if whole:
            raise ModelError(
                f'[adapter] init = "{config.init}" takes a share out of each adapted weight, which embeddings and the '
                f'output head can\'t give; leave "{_leaf(whole[0])}" out of targets, or use init = "default"'
            )


def trained_in_full(model: PreTrainedModel, config: AdapterConfig) -> tuple[str, ...]:
    """Names of modules, or the ends of names, whose own weights are trained."""
    return (*config.modules_to_save, *(match_targets(model, config) if config.type == "full" else ()))


def match_parameters(model: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """Names of the fused experts' weights that `suffixes`, those of `target_parameters`, cover.

    Raises:
        ModelError: one matches no weight of experts, or the model computes these experts in a way of its own.
    """
    there = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if experts.is_experts(module)
        for name in experts.projections(module)
    ]
    matched = set()
    for suffix in suffixes:
        found = [name for name in there if has_suffix(name, suffix)]
        if not found:
            raise ModelError(_no_parameter(model, suffix, there))
        matched.update(found)
    return [name for name in there if name in matched]


def _no_parameter(model: nn.Module, suffix: str, there: list[str]) -> str:
    begin = f"[adapter] target_parameters: {json.dumps(suffix)}"
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and has_suffix(f"{path}.{leaf}", suffix):
                return (
                    f"{begin} is a weight of {type(module).__name__}, which computes its experts in a way of its own, "
                    "so that no adapter reaches them; leave it out"
                )
    if not there:
        return f"{begin} matches nothing: {type(model).__name__} has no fused experts; leave target_parameters out"
    kinds = sorted({_leaf(name) for name in there})
    return (
        f"{begin} matches no weight of experts{_did_you_mean(_leaf(suffix), kinds)}. Those there are: "
        f"{', '.join(kinds)}, e.g. {there[0]}"
    )


def require_packed_target(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    quantization: QuantizationConfig,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Require that the recipe itself does not keep everything in full precision that the adapter is put on.

    `stored` is what the `config.json` of a checkpoint that is already quantized says of that.

    Raises:
        ModelError: every weight that the adapter covers would be packed, but for `skip` or `experts = false`.
    """
    adapted = {*match_targets(model, adapter), *match_parameters(model, adapter.target_parameters)}
    kept = () if stored is None else kept_modules(stored)
    spared = packable(model, kept) - packable(model, (*quantization.skip, *kept), quantization.experts)
    if adapted <= spared:
        example = min(adapted)
        raise ModelError(
            f"[quantization] keeps everything in full precision that the adapter is put on ({len(adapted)} weights, "
            f"e.g. {example}); adapt something that is packed, take it out of "
            f"{'skip' if quantization.experts else 'skip, or experts = false out'}, or leave [quantization] out to "
            "train on the base as it is"
        )


def takes_all_linear(config: AdapterConfig) -> bool:
    """Whether `targets` is or holds `all-linear`."""
    return config.targets == ALL_LINEAR or (not isinstance(config.targets, str) and ALL_LINEAR in config.targets)


def left_out(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that `all-linear` does not reach, because PEFT takes their names for experts."""
    linears = linear_layers(model)
    taken = _taken_for_experts(model, linears)
    return [name for name in linears if _leaf(name) in taken]


def peft_targets(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """`config.targets` as PEFT takes them."""
    matched = match_targets(model, config)
    if isinstance(config.targets, str) and config.targets != ALL_LINEAR:
        return matched  # PEFT would apply the expression to modules of every kind, and to the output head
    listed = () if isinstance(config.targets, str) else config.targets
    if not takes_all_linear(config):
        return list(listed)
    beside = set(_beside(model))
    return sorted({_leaf(name) for name in matched if name not in beside} | {*listed} - {ALL_LINEAR})


def require_trained_tokens(model: PreTrainedModel, additions: Additions, config: AdapterConfig) -> None:
    """Require that an adapter trains the rows of added tokens: untrained, they mean nothing to the model.

    That holds for rows that an embedding had to spare as well. `model` may be on the meta device.

    Raises:
        ModelError: it does not; names the tokens, and the modules to train.
    """
    if not additions.tokens:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    names = [name for name, module in model.named_modules() if module is embedding or (module is head and not tied)]
    either = [name for name, module in model.named_modules() if module is embedding or module is head]
    full = trained_in_full(model, config)
    trained = {name for name in either if any(has_suffix(name, saved) for saved in full)}
    if trained and (tied or trained.issuperset(names)):
        return
    wanted = dict.fromkeys([*config.modules_to_save, *(_leaf(name) for name in names if name not in trained)])
    shown = ", ".join(additions.tokens[:5])
    more = f" and {len(additions.tokens) - 5} more" if len(additions.tokens) > 5 else ""
    raise ModelError(
        f"[model] adds tokens that the vocabulary lacks ({shown}{more}), and nothing trains their embeddings: set "
        f"[adapter] modules_to_save = {json.dumps([*wanted])}, or leave the tokens out"
    )


def has_suffix(name: str, suffix: str) -> bool:
    """Whether the last parts of a dotted name are `suffix`."""
    return name == suffix or name.endswith("." + suffix)


def above(name: str, module: str) -> str:
    """The part of a layer's name down to a module of the name `module` that the layer is in; empty where it is in none.

    >>> above("model.layers.0.mlp.up_proj", "mlp")
    'model.layers.0.mlp'
    """
    parts = name.split(".")
    wanted = module.split(".")
    for end in range(len(parts), len(wanted) - 1, -1):
        if parts[end - len(wanted) : end] == wanted:
            return ".".join(parts[:end])
    return ""


def head_names(model: PreTrainedModel) -> list[str]:
    """The name of the output head, in a list that is empty where there is none."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def _beside(model: PreTrainedModel) -> list[str]:
    """Names of the layers that only a list of targets reaches: embeddings and the output head."""
    head = [name for name in head_names(model) if isinstance(model.get_submodule(name), nn.Linear)]
    return [*(name for name, module in model.named_modules() if isinstance(module, nn.Embedding)), *head]


def _taken_for_experts(model: nn.Module, linears: list[str]) -> set[str]:
    """Last parts of the names of linear layers that PEFT does not take for linear layers.

    In some mixtures of experts PEFT turns `up_proj` as a target into the experts' fused weight, and then leaves out the
    linear layers of that name that stand beside the experts.
    """
    taken = set()
    for leaf in {_leaf(name) for name in linears} if any(map(experts.is_experts, model.modules())) else ():
        probe = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # one of two names that PEFT turns into one weight
            taken.add(leaf)
        if leaf not in (probe.target_modules or ()):
            taken.add(leaf)
    return taken


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(
            f"[adapter] targets: expected a regular expression, found {json.dumps(pattern)}: {error}"
        ) from error


def _no_match(target: str, names: list[str]) -> str:
    kinds: dict[str, int] = {}
    for name in names:
        kinds[_leaf(name)] = kinds.get(_leaf(name), 0) + 1
    there_are = ", ".join(f"{leaf} (x{count})" for leaf, count in sorted(kinds.items())) or "none"
    example = f", e.g. {names[0]}" if names else ""
    return (
        f"[adapter] targets: {json.dumps(target)} matches no linear layer{_did_you_mean(target, list(kinds))}. "
        f"The linear layers there are: {there_are}{example}. A list holds name suffixes; a string is one regular "
        'expression over whole names, or "all-linear"'
    )


def _did_you_mean(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
