"""Rules for the quantization, whose spellings the legacy pass of the recipe understands.

All of them are handed to `quantune.recipe.legacy` together, as they would stand at the head of a recipe; what it makes
of them, or finds wrong, is the outcome of the keys it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import attrs

from quantune.recipe import legacy
from quantune.recipe.legacy.arguments import SWITCHES, Arguments, of_bitsandbytes, of_config
from quantune.recipe.legacy.foreign import FOREIGN as FOREIGN_METHODS
from quantune.recipe.legacy.reading import KEYS
from quantune.recipe.migrate.reading import Path, key_text, leaves
from quantune.recipe.migrate.rule import (
    Config,
    Leaf,
    Outcome,
    RecipePath,
    Rule,
    drop,
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
SPELLINGS = ("adapter", *KEYS)
"""The keys that the legacy pass rewrites."""
FOREIGN = tuple(key for key in FOREIGN_METHODS if key != "quantization")
"""Keys of methods that quantune does not have, which it refuses; `quantization` is always such a block in a YAML."""
SWITCHED = tuple(key for key in FOREIGN if key != "qat")
"""Those that are true or false."""
PRECISION: RecipePath = ("training", "precision")
_ARGUMENTS = ("bnb_config_kwargs", "model_quantization_config_kwargs", "config_kwargs")
"""Keys that hold arguments of transformers' config classes."""


_TABLES = re.compile(r"\[(model|quantization|adapter|training)\]")
_WAYS_OUT = {
    "QT100": "keep one of them",
    "QT101": "qlora is lora on bnb's nf4; for another quantization write adapter: lora",
    "QT102": "for 8 bits write adapter: lora with load_in_8bit: true",
    "QT103": "leave out load_in_4bit, or write adapter: lora to train on the base as it is",
    "QT104": "keep one of them: load_in_4bit is nf4, load_in_8bit is int8",
    "QT110": "choose the unquantized base with load_in_4bit: true, and remove gptq",
    "QT111": "keep one of them: qat names the format itself, and trains for it on a base that is stored as it is",
    "QT113": "remove fp8; fp8 weights are model_quantization_config: {backend: torchao, weight_dtype: fp8}",
    "QT114": "remove relora; a larger lora_r reaches further",
    "QT116": "name it with its options: {backend: torchao, weight_dtype: int4}",
    "QT117": "a base is stored in one format: keep the backend that was meant",
    "QT118": "leave it out, or name Mxfp4Config or FineGrainedFP8Config in model_quantization_config",
    "QT119": "add load_in_4bit: true, which packs the experts too, or leave it out",
    "QT124": "add load_in_4bit: true, whose settings they are, or leave them out",
}
"""The ways out that the legacy pass words for the tables of a recipe, as a YAML has them."""
_EXPECTED = {
    "bnb_config_kwargs": "quantune computes in bf16 or fp32, as bf16: true or false says where this key is left out",
    "model_quantization_config": "or write its backend: {backend: bnb, weight_dtype: nf4}",
}
"""Likewise of QT013, by key."""


@attrs.frozen(kw_only=True)
class Spelled:
    """What the legacy pass says of a document."""

    tables: Mapping[RecipePath, Any]
    """Keys of `[quantization]` and `[adapter]`, and the precision, that the spellings come to; none where they
    contradict each other."""
    sources: Mapping[RecipePath, Path]
    """Where each of them comes from."""
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
    for section in ("quantization", "adapter", "training"):
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
        sources=made.sources,
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
    if leaf.path[:-1] in ((), ("bnb_config_kwargs",)) and leaf.name in SWITCHES and not flag(leaf.value):
        return same()
    if found.findings:
        fault = key_text(found.findings[0].path)
        return refuse(f"{fault} is refused, and without it a recipe can't say how the base is quantized")
    quantized = ("quantization", "backend") in found.tables
    if root == "quantize_moe_experts":
        return write("quantization.experts", flag(leaf.value)) if quantized else same()
    if not quantized:
        return same() if is_off(leaf.value) else refuse("it quantizes nothing without the key that names the format")
    made = _argument(leaf)
    return _said(_share(leaf), leaf) if made is None else _as_argument(made, leaf)


def named_alone(path: Path, config: Config) -> bool:
    """Whether a null is all there is below the key that names the backend, as in `{bnb: {weight_dtype: null}}`."""
    source = spelled(config).sources.get(("quantization", "backend"), ())
    if len(source) != 2 or path[:2] != source:
        return False
    return all(value is None for below, value in leaves(config.values) if below[:2] == source)


def _said(values: Mapping[RecipePath, Any], leaf: Leaf) -> Outcome:
    """The recipe's keys with their values, and at one key of the YAML that its experts are packed."""
    if leaf.path != _tells_of_experts(leaf.config):
        return writes(values)
    note = "fused experts of a mixture model are packed too; experts = false leaves them as there"
    return writes(values, note, changed=True)


@lru_cache(maxsize=1)
def _tells_of_experts(config: Config) -> Path | None:
    """The key that names the backend, where `quantize_moe_experts` is silent: that tool packs experts only with it."""
    found = spelled(config)
    backend = ("quantization", "backend")
    if config.get("quantize_moe_experts") is not None or found.tables.get(backend) not in ("bnb", "torchao"):
        return None
    source = found.sources[backend]
    below = [path for path, value in leaves(config.values) if path[: len(source)] == source and value is not None]
    return min(below, key=key_text, default=None)


def _argument(leaf: Leaf) -> Arguments | None:
    """What a key comes to that is an argument of transformers' config classes; None for another one."""
    above, given = leaf.path[:-1], {leaf.name: leaf.value}
    if not above or above[-1] not in _ARGUMENTS or leaf.name in SWITCHES:
        return None
    if above[-1] == "bnb_config_kwargs":
        return of_bitsandbytes(above, given)
    return of_config(above, spelled(leaf.config).tables["quantization", "backend"], given)


def _as_argument(made: Arguments, leaf: Leaf) -> Outcome:
    paths = [PRECISION if key == "precision" else ("quantization", key) for key in made.places]
    tables = spelled(leaf.config).tables
    if paths:
        return writes({path: tables[path] for path in paths})
    return drop("; ".join(made.notes)) if made.notes else same()


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
    """The part of the table that neither a key of the mapping at `above` names nor one that says nothing else."""
    holder: Any = config.values
    for step in above:
        holder = holder[step]
    named = {key for key, value in holder.items() if value is not None} if isinstance(holder, dict) else set()
    found = spelled(config)
    return {
        path: value
        for path, value in found.tables.items()
        if path[0] == "quantization" and path[1] not in named and not _is_setting(found.sources.get(path, ()))
    }


def _is_setting(source: Path) -> bool:
    """Whether a key of the YAML says one key of the table and no more."""
    argued = len(source) > 1 and source[-2] in _ARGUMENTS and source[-1] not in SWITCHES
    return argued or source == ("quantize_moe_experts",)


def _adapter(leaf: Leaf) -> Outcome:
    if is_off(leaf.value):
        return same()
    if leaf.value not in ADAPTERS:
        return refuse(f"quantune's adapters are {' and '.join(ADAPTERS)}")
    if leaf.value == "lora":
        return write("adapter.type", "lora")
    return _said({**_unnamed(leaf.config, ()), ("adapter", "type"): "lora"}, leaf)


def _finding(leaf: Leaf) -> Finding | None:
    """What is said against this key, or against one above or below it."""
    found = spelled(leaf.config)
    above = (found.at.get(leaf.path[:length]) for length in range(len(leaf.path), 0, -1))
    return next((finding for finding in above if finding), found.below.get(leaf.path))


def is_quantized(config: Config) -> bool:
    """Whether a key that the legacy pass knows names the format of the base, or contradicts another one about it."""
    found = spelled(config)
    return bool(found.findings) or ("quantization", "backend") in found.tables


def said_of_foreign(config: Config, key: str) -> str | None:
    """What is wrong with a key of a method that quantune does not have; None where it is off."""
    finding = spelled(config).foreign.get(key)
    return None if finding is None else _in_words(finding)


def _in_words(finding: Finding) -> str:
    """What is wrong and what to do about it, in the words of a YAML."""
    message, hint = finding.message.replace(" = ", ": "), finding.hint
    if hint and _TABLES.search(hint):
        of_key = _EXPECTED.get(str(finding.path[0])) if finding.code == "QT013" else None
        hint = of_key or _WAYS_OUT.get(finding.code)
    return f"{message}; {hint.replace(' = ', ': ')}" if hint else message


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
            (("merge_lora",), "quantune merge RUN merges, after training"),
            (("gptq",), "a GPTQ checkpoint can't be trained on; choose the unquantized base with load_in_4bit: true"),
            (("fp8",), "quantune computes in bf16 or fp32"),
            (("relora",), "an adapter is never merged into a quantized base during training"),
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
