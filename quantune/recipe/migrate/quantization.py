"""Rules for the quantization, whose spellings the legacy pass of the recipe understands.

All of them are handed to `quantune.recipe.legacy` together, as they would stand at the head of a recipe; what it makes
of them, or finds wrong, is the outcome of the keys it came from.
"""

from __future__ import annotations

from typing import Any

from quantune.recipe import legacy
from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    RecipePath,
    Rule,
    refuse,
    refused,
    same,
    translate,
    writes,
)
from quantune.recipe.migrate.values import flag, is_off
from quantune.recipe.structure import Finding

ADAPTERS = ("lora", "qlora")
SWITCHES = ("load_in_4bit", "load_in_8bit")
SPELLINGS = (
    "adapter",
    *SWITCHES,
    "model_quantization_config",
    "model_quantization_config_kwargs",
    "peft",
    "bnb_config_kwargs",
    "quantize_moe_experts",
)
"""The keys that the legacy pass looks at."""


def spelled(config: Config) -> dict[str, Any]:
    """The part of a document that the legacy pass is given; what is null, or is LoftQ's, is left out."""
    given = {key: config.get(key) for key in SPELLINGS if config.get(key) is not None}
    if isinstance(given.get("peft"), dict):
        rest = {key: value for key, value in given.pop("peft").items() if key != "loftq_config" and value is not None}
        if rest:
            given["peft"] = rest
    if given.get("adapter") not in ADAPTERS:
        given.pop("adapter", None)
    return given


def rewritten(config: Config) -> legacy.Rewritten:
    """What the legacy pass makes of the document."""
    return legacy.rewrite(spelled(config))


def tables(config: Config) -> dict[RecipePath, Any]:
    """The keys of `[quantization]` and `[adapter]` that the spellings come to."""
    made = rewritten(config)
    found: dict[RecipePath, Any] = {}
    for section in ("quantization", "adapter"):
        table = made.document.get(section)
        if isinstance(table, dict) and not made.findings:
            found.update({(section, key): value for key, value in table.items()})
    return found


def _spelling(leaf: Leaf) -> Outcome:
    said = _finding(leaf)
    if said is not None:
        return refuse(f"{said.message}; {said.hint}" if said.hint else said.message)
    root = leaf.path[0]
    if root == "adapter":
        return _adapter(leaf)
    if root in SWITCHES and not flag(leaf.value):
        return same()
    made = {path: value for path, value in tables(leaf.config).items() if path[0] == "quantization"}
    own = {path: value for path, value in made.items() if path[1] == leaf.name}
    if root == "quantize_moe_experts":
        return writes({("quantization", "experts"): flag(leaf.value)}) if made else same()
    if not made:
        return same() if is_off(leaf.value) else refuse("it quantizes nothing without the key that names the format")
    return writes(own or made)


def _adapter(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    if leaf.value not in ADAPTERS:
        return refuse(f"quantune's adapters are {' and '.join(ADAPTERS)}")
    made: dict[RecipePath, Any] = {("adapter", "type"): "lora"}
    if leaf.value == "qlora":
        made.update(tables(leaf.config))
    return writes(made)


def _finding(leaf: Leaf) -> Finding | None:
    """What the legacy pass says against this key, or against one above or below it."""
    for finding in rewritten(leaf.config).findings:
        length = min(len(finding.path), len(leaf.path))
        if finding.path[:length] == leaf.path[:length]:
            return finding
        other = getattr(finding, "other", None)
        if other and other[: min(len(other), len(leaf.path))] == leaf.path[: min(len(other), len(leaf.path))]:
            return finding
    return None


def _merge(leaf: Leaf) -> Outcome:
    return refuse("merging is a command of its own, after training") if flag(leaf.value) else same()


RULES: tuple[Rule, ...] = (
    translate("adapter", to='`adapter`, and with "qlora" `[quantization]`', by=_spelling),
    translate(*SWITCHES, to='`[quantization]` with `backend = "bnb"`', by=_spelling),
    translate(
        "model_quantization_config",
        "model_quantization_config.**",
        "model_quantization_config_kwargs.**",
        "peft.backend",
        "peft.weight_dtype",
        "peft.group_size",
        to="`[quantization]`",
        by=_spelling,
    ),
    translate("bnb_config_kwargs.**", to='the options of `backend = "bnb"`', by=_spelling),
    translate("quantize_moe_experts", to="`quantization.experts`", by=_spelling),
    translate("merge_lora", to="nothing, when it is off", by=_merge),
    refused(
        "gptq",
        "gptq_groupsize",
        "gptq_model_v1",
        "gptq_disable_exllama",
        because="a GPTQ checkpoint can't be trained on; choose the unquantized base and add [quantization]",
    ),
    refused(
        "qat",
        "qat.**",
        "quantization",
        "quantization.**",
        because="quantune quantizes the frozen base before training, neither during it nor after it",
    ),
    refused("fp8", "fp8_enable_fsdp_float8_all_gather", because="quantune computes in bf16 or fp32"),
    refused(
        "relora",
        "relora_prune_ratio",
        "relora_prune_method",
        "relora_cpu_offload",
        "relora_steps",
        "relora_warmup_steps",
        "relora_anneal_steps",
        "jagged_restart_steps",
        "jagged_restart_warmup_steps",
        "jagged_restart_anneal_steps",
        because="an adapter is never merged into a quantized base during training",
    ),
)
