"""Rules for the quantization, whose spellings the legacy pass of the recipe understands.

All of them are handed to `quantune.recipe.legacy` together, as they would stand at the head of a recipe; what it makes
of them, or finds wrong, is the outcome of the keys it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import attrs

from quantune.recipe import legacy
from quantune.recipe.migrate.reading import Path
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
    write,
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
"""The keys that the legacy pass rewrites."""
SWITCHED = ("gptq", "fp8", "relora", "merge_lora")
FOREIGN = (*SWITCHED, "qat")
"""Keys of methods that quantune does not have, which it refuses."""


@attrs.frozen(kw_only=True)
class Spelled:
    """What the legacy pass says of a document."""

    tables: Mapping[RecipePath, Any]
    """Keys of `[quantization]` and `[adapter]` that the spellings come to; none where they contradict each other."""
    findings: tuple[Finding, ...]
    """What is wrong with them."""
    at: Mapping[Path, Finding]
    """What is wrong with a key, or with all below it."""
    below: Mapping[Path, Finding]
    """What is wrong with something below a key."""
    foreign: Mapping[str, Finding]
    """What is wrong with the keys of methods that quantune does not have."""


@lru_cache(maxsize=1)
def spelled(config: Config) -> Spelled:
    """What the legacy pass makes of the document; what is null, or LoftQ's, is left out."""
    given = {key: config.get(key) for key in SPELLINGS if config.get(key) is not None}
    if isinstance(given.get("peft"), dict):
        rest = {key: value for key, value in given.pop("peft").items() if key != "loftq_config" and value is not None}
        given.update({"peft": rest} if rest else {})
    if given.get("adapter") not in ADAPTERS:
        given.pop("adapter", None)
    made = legacy.rewrite(dict(given))
    tables: dict[RecipePath, Any] = {}
    for section in ("quantization", "adapter"):
        table = made.document.get(section)
        if isinstance(table, dict) and not made.findings:
            tables.update({(section, key): value for key, value in table.items()})
    foreign = {key: config.get(key) for key in FOREIGN if not is_off(config.get(key))}
    against = {str(found.path[0]): found for found in legacy.rewrite({**given, **foreign}).findings}
    at: dict[Path, Finding] = {}
    below: dict[Path, Finding] = {}
    for finding in made.findings:
        for place in (finding.path, finding.other or finding.path):
            at.setdefault(place, finding)
            for length in range(1, len(place)):
                below.setdefault(place[:length], finding)
    return Spelled(
        tables=tables,
        findings=tuple(made.findings),
        at=at,
        below=below,
        foreign={key: finding for key, finding in against.items() if key in foreign},
    )


def _spelling(leaf: Leaf) -> Outcome:
    found = spelled(leaf.config)
    said = _finding(leaf)
    if said is not None:
        return refuse(_in_words(said))
    root = leaf.path[0]
    if root == "adapter":
        return _adapter(leaf)
    if root in SWITCHES and not flag(leaf.value):
        return same()
    if found.findings:
        return refuse(_in_words(found.findings[0]))
    quantized = ("quantization", "backend") in found.tables
    if root == "quantize_moe_experts":
        return write("quantization.experts", flag(leaf.value)) if quantized else same()
    if not quantized:
        return same() if is_off(leaf.value) else refuse("it quantizes nothing without the key that names the format")
    return writes(_share(leaf), None if leaf.config.get("adapter") == "qlora" else _experts_note(leaf.config))


def _experts_note(config: Config) -> str | None:
    """What differs where `quantize_moe_experts` is silent: that tool packs fused experts only when it is on."""
    backend = spelled(config).tables.get(("quantization", "backend"))
    if config.get("quantize_moe_experts") is not None or backend not in ("bnb", "torchao"):
        return None
    return "fused experts of a mixture model are packed too; experts = false leaves them, as there by default"


def _share(leaf: Leaf) -> Mapping[RecipePath, Any]:
    """The part of the table that a key says: its own, and what no key beside it names."""
    own = ("quantization", leaf.name)
    tables, rest = spelled(leaf.config).tables, _unnamed(leaf.config, leaf.path[:-1])
    if own not in tables:
        return rest
    flat = ("quantization", "backend") not in rest and leaf.name != "backend"
    return {own: tables[own], **({} if flat else rest)}


@lru_cache(maxsize=8)
def _unnamed(config: Config, above: Path) -> Mapping[RecipePath, Any]:
    """The part of the table that no key of the mapping at `above` names."""
    holder: Any = config.values
    for step in above:
        holder = holder[step]
    tables = spelled(config).tables.items()
    return {path: value for path, value in tables if path[0] == "quantization" and path[1] not in holder}


def _adapter(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    if leaf.value not in ADAPTERS:
        return refuse(f"quantune's adapters are {' and '.join(ADAPTERS)}")
    if leaf.value == "lora":
        return write("adapter.type", "lora")
    tables = spelled(leaf.config).tables
    return writes({**tables, ("adapter", "type"): "lora"}, _experts_note(leaf.config) if tables else None)


def _finding(leaf: Leaf) -> Finding | None:
    """What is said against this key, or against one above or below it."""
    found = spelled(leaf.config)
    above = (found.at.get(leaf.path[:length]) for length in range(len(leaf.path), 0, -1))
    return next((finding for finding in above if finding), found.below.get(leaf.path))


def _in_words(finding: Finding) -> str:
    return f"{finding.message}; {finding.hint}" if finding.hint else finding.message


def _foreign(because: str) -> Callable[[Leaf], Outcome]:
    """The rule for a key of a method that quantune does not have: the legacy pass says what is wrong with it."""

    def apply(leaf: Leaf) -> Outcome:
        root = leaf.path[0]
        if is_off(leaf.value) or (root in SWITCHED and not flag(leaf.value)):
            return same()
        finding = spelled(leaf.config).foreign.get(root)
        return refuse(_in_words(finding) if finding else because)

    return apply


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
    *(
        Rule(keys=keys, treatment="refuse", meaning=because, apply=_foreign(because))
        for keys, because in (
            (("merge_lora",), "merging is a command of its own, after training"),
            (("gptq",), "a GPTQ checkpoint can't be trained on; choose the unquantized base and add [quantization]"),
            (("fp8",), "quantune computes in bf16 or fp32"),
            (("relora",), "an adapter is never merged into a quantized base during training"),
            (("qat", "qat.**"), "the quantized base is frozen, so that it can't be trained around"),
            (("quantization", "quantization.**"), "the base is quantized before training, not after it"),
        )
    ),
    refused("gptq_groupsize", "gptq_model_v1", "gptq_disable_exllama", because="they belong to a GPTQ checkpoint"),
    refused("fp8_enable_fsdp_float8_all_gather", because="quantune computes in bf16 or fp32"),
    refused(
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
