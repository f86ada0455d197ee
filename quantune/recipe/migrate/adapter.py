"""Rules for the adapter."""

from __future__ import annotations

import re
from typing import Any

import attrs

from quantune.recipe.migrate.qat import trains, trains_all_weights
from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    Rule,
    drop,
    dropped,
    path_value,
    refuse,
    refused,
    same,
    translate,
    write,
    writes,
)
from quantune.recipe.migrate.rule import value as takes
from quantune.recipe.migrate.values import Unusable, flag, is_off, names, number, whole
from quantune.recipe.qat_conflicts import OF_LORA
from quantune.recipe.schema import ALL_LINEAR

_OF_LORA = frozenset((*(("adapter", key) for key in OF_LORA), ("training", "loraplus_lr_ratio")))
_REGEX = re.compile(r"[\\^$*+?{}\[\]()|]")
_INITS = {"gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "loftq": "loftq"}


def targets(config: Config) -> Any:
    """What `lora_target_modules` and `lora_target_linear` name together; None for nothing."""
    given = config.get("lora_target_modules")
    linear = config.flag("lora_target_linear")
    if is_off(given):
        return ALL_LINEAR if linear else None
    if isinstance(given, str):
        if not linear:
            return given
        return ALL_LINEAR if given == ALL_LINEAR or _REGEX.search(given) else [ALL_LINEAR, given]
    try:
        listed = [name for name in names(given) if name != ALL_LINEAR]
    except Unusable:
        return ALL_LINEAR if linear else None
    return [ALL_LINEAR, *listed] if linear else names(given)


def _target_modules(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    names(leaf.value)
    made = targets(leaf.config)
    if made == ALL_LINEAR and leaf.value != ALL_LINEAR:
        return drop("a regular expression beside lora_target_linear: true matched nothing more there")
    if isinstance(leaf.value, str) and isinstance(made, str) and not _REGEX.search(made) and made != ALL_LINEAR:
        return write("adapter.targets", made, "one regular expression that must match a whole module name, there too")
    return write("adapter.targets", made)


def _target_linear(leaf: Leaf) -> Outcome:
    return write("adapter.targets", targets(leaf.config)) if flag(leaf.value) else same()


def _fan_in(leaf: Leaf) -> Outcome:
    return drop("PEFT knows which way round a layer stores its weight") if flag(leaf.value) else same()


def _on(path: str) -> Any:
    return lambda leaf: write(path, True) if flag(leaf.value) else same()


def _init(leaf: Leaf) -> Outcome:
    if leaf.value is True:
        return same()
    name = str(leaf.value).strip().lower()
    if name in _INITS:
        return write("adapter.init", _INITS[name])
    if name.startswith("pissa_niter_"):
        return write(
            "adapter.init", "pissa", "with an exact decomposition, not the fast one of that name", changed=True
        )
    return refuse(f"quantune begins an update in one of these ways: default, {', '.join(_INITS)}")


def _dropout(leaf: Leaf) -> Outcome:
    rate = number(leaf.value)
    if rate and trains(leaf.config) and not trains_all_weights(leaf.config):
        return writes(
            {}, "qat rounds the sum of base and adapter, which has one input; there is no dropout", changed=True
        )
    return write("adapter.dropout", rate)


def _loftq(leaf: Leaf) -> Outcome:
    whole(leaf.value)
    note = "for the format that [quantization] names, whatever loftq_bits says"
    return write("adapter.init", "loftq", note, changed=True)


def _with_qat(rule: Rule) -> Rule:
    """The rule, but for what has no meaning beside `qat`."""

    def apply(leaf: Leaf) -> Outcome:
        outcome = rule.apply(leaf)
        if trains_all_weights(leaf.config) and any(path in _OF_LORA for path, _ in outcome.writes):
            return drop("no adapter is named, and qat then trains all weights, there too")
        if trains(leaf.config) and (("adapter", "init"), "loftq") in outcome.writes:
            note = "loftq makes up for what packing loses, and qat begins with the original weights; it begins at zero"
            return writes({}, note, changed=True)
        return outcome

    return attrs.evolve(rule, apply=apply)


_RULES: tuple[Rule, ...] = (
    takes("lora_r", "adapter.r", whole),
    takes("lora_alpha", "adapter.alpha", number),
    translate("lora_dropout", to="`adapter.dropout`", by=_dropout),
    translate("lora_target_modules", to="`adapter.targets`", by=_target_modules),
    translate("lora_target_linear", to='`adapter.targets = "all-linear"`, or among others', by=_target_linear),
    takes("lora_target_parameters", "adapter.target_parameters", names),
    takes("lora_modules_to_save", "adapter.modules_to_save", names),
    path_value("lora_model_dir", "adapter.start_from"),
    translate("lora_fan_in_fan_out", to="nothing: PEFT knows", by=_fan_in),
    translate("peft_use_dora", to="`adapter.use_dora`", by=_on("adapter.use_dora")),
    translate("peft_use_rslora", to="`adapter.use_rslora`", by=_on("adapter.use_rslora")),
    translate("peft_init_lora_weights", to="`adapter.init`", by=_init),
    translate("peft.loftq_config.loftq_bits", to='`adapter.init = "loftq"`', by=_loftq),
    takes("loraplus_lr_ratio", "training.loraplus_lr_ratio", number),
    dropped("loraplus_lr_embedding", because="no adapter of quantune is on the embeddings"),
    dropped("lora_on_cpu", because="the base is streamed, so that it never takes more than its packed size"),
    dropped("peft_autocast_adapter_dtype", because="adapters are always fp32"),
    dropped("qlora_sharded_model_loading", because="the base is always packed while it is read"),
    dropped("merge_method", because="quantune merge RUN merges, after training"),
    refused(
        "peft_layers_to_transform",
        "peft_layers_pattern",
        because="write the layers into lora_target_modules as one regular expression, "
        r'e.g. "model\.layers\.(0|1|2)\..*\.q_proj"',
    ),
    refused(
        "lora_rank_pattern.**",
        "lora_alpha_pattern.**",
        because="every layer has the same rank and alpha in quantune",
    ),
    refused("lora_exclude_modules", because="name what is adapted in lora_target_modules"),
    refused("peft_layer_replication", because="quantune does not repeat layers of the base"),
    refused(
        "peft_trainable_token_indices",
        "peft_trainable_token_indices.**",
        because="train whole embeddings with lora_modules_to_save",
    ),
    refused("peft_ensure_weight_tying", because="quantune keeps weights tied as the base has them"),
)
RULES: tuple[Rule, ...] = tuple(map(_with_qat, _RULES))
