"""What that tool does where a YAML is silent, and what it can't be silent about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from quantune.recipe.migrate.adapter import targets
from quantune.recipe.migrate.data import LENGTH, evaluates
from quantune.recipe.migrate.datasets import PARTS, ROLES_THERE, format_of
from quantune.recipe.migrate.prompts import prompt_of
from quantune.recipe.migrate.qat import GROUP_SIZE, qat_format, trains, trains_all_weights
from quantune.recipe.migrate.quantization import ADAPTERS, spelled
from quantune.recipe.migrate.rule import Config, RecipePath
from quantune.recipe.migrate.training import batch_size, micro_batch_size, scheduled
from quantune.recipe.migrate.values import is_off


@attrs.frozen(kw_only=True)
class Default:
    """A key of the recipe that is written although no key of the YAML says it."""

    path: RecipePath
    """The recipe's key."""
    value: Any
    """Its value."""
    note: str
    """Where it comes from, in a few words."""


@attrs.frozen(kw_only=True)
class Lack:
    """Something that a recipe needs and the YAML does not say."""

    key: str
    """The key that would say it."""
    message: str
    """What was expected."""
    hint: str
    """What to do."""


THERE = "the default there"
_ROWS: tuple[tuple[str, str, Callable[[Config], Any], str], ...] = (
    ("data", "max_length", lambda config: LENGTH, THERE),
    ("adapter", "r", lambda config: 8, THERE),
    ("adapter", "alpha", lambda config: 8, THERE),
    ("training", "batch_size", batch_size, THERE),
    ("training", "micro_batch_size", micro_batch_size, THERE),
    ("training", "warmup_ratio", lambda config: 0.03, f"{THERE}, and at most 100 steps"),
    ("training", "tf32", lambda config: True, f"{THERE}, on a GPU that has it"),
    ("checkpoint", "per_epoch", lambda config: 1, THERE),
    ("checkpoint", "keep", lambda config: 4, THERE),
    ("quantization", "group_size", lambda config: GROUP_SIZE, f"{THERE} for qat"),
    ("evaluation", "batch_size", micro_batch_size, "micro_batch_size, the default there"),
    ("evaluation", "at_start", lambda config: True, THERE),
    ("evaluation", "at_end", lambda config: False, "nothing asked for an evaluation; true evaluates at the end"),
)
"""Section, key, value, note; `_applies` says when a row is written."""


def defaults(config: Config, written: set[RecipePath]) -> Iterator[Default]:
    """The defaults that differ from quantune's, for the keys that nothing wrote."""
    for section, key, value, note in _ROWS:
        if (section, key) not in written and _applies(section, key, config, written):
            yield Default(path=(section, key), value=value(config), note=note)
    for key, part in PARTS.items():
        listed = config.get(key)
        for index, dataset in enumerate(listed if isinstance(listed, list) else ()):
            yield from _of_source(("data", part, index), dataset, written)


def _of_source(source: RecipePath, dataset: Any, written: set[RecipePath]) -> Iterator[Default]:
    if format_of(dataset) == "chat" and (*source, "format") in written and is_off(dataset.get("roles")):
        yield Default(path=(*source, "roles"), value=ROLES_THERE, note=THERE)
    prompt = dataset.get("type") if isinstance(dataset, dict) else None
    if isinstance(prompt, dict) and (*source, "format") in written:
        for key, value in prompt_of(prompt).items():
            if (*source, key) not in written:
                yield Default(path=(*source, key), value=value, note=THERE)
    of_hub = (*source, "dataset") in written and is_off(dataset.get("data_files"))
    if source[1] == "eval" and of_hub and is_off(dataset.get("split")):
        yield Default(path=(*source, "split"), value="test", note=f"{THERE} for test_datasets")


def _applies(section: str, key: str, config: Config, written: set[RecipePath]) -> bool:
    if (section, key) == ("training", "warmup_ratio"):
        return (section, "warmup_steps") not in written
    if (section, key) == ("training", "tf32"):
        return "tf32" not in config.values  # a null switches it off
    if (section, key) == ("checkpoint", "per_epoch"):
        return (section, "every_steps") not in written and config.get("save_strategy") not in ("no", False)
    if section == "quantization":
        return trains(config) and qat_format(config).get("weight_dtype") == "int4"
    if section == "evaluation":
        held_out = is_off(config.get("test_datasets"))  # rows of their own are there to be evaluated
        wanted = {"batch_size": True, "at_start": scheduled(config), "at_end": held_out and not scheduled(config)}
        return evaluates(config) and wanted[key]
    return section != "adapter" or (config.get("adapter") in ADAPTERS and is_off(config.get("lora_model_dir")))


def lacks(config: Config) -> Iterator[Lack]:
    """What a recipe can't do without."""
    if is_off(config.get("base_model")):
        yield Lack(key="base_model", message="expected base_model, found none", hint="name a folder or a hub id")
    sources = [config.get(key) for key in (*PARTS, "pretraining_dataset")]
    if is_off(sources[0]) and is_off(sources[2]):
        yield Lack(key="datasets", message="expected datasets, found none", hint="list at least one with path and type")
    for key in PARTS:
        listed = config.get(key)
        for index, dataset in enumerate(listed if isinstance(listed, list) else ()):
            for needed in ("path", "type"):
                if isinstance(dataset, dict) and dataset and is_off(dataset.get(needed)):
                    hint = (
                        "a file or a hub id"
                        if needed == "path"
                        else "chat_template, alpaca or completion, for instance"
                    )
                    yield Lack(
                        key=f"{key}[{index}].{needed}", message=f"expected {needed} in {key}[{index}]", hint=hint
                    )
    if is_off(config.get("learning_rate")):
        yield Lack(key="learning_rate", message="expected learning_rate, found none", hint="2e-4 is usual for LoRA")
    if is_off(config.get("adapter")) and not trains_all_weights(config):
        yield from _no_adapter(config)
    elif config.get("adapter") in ADAPTERS and targets(config) is None and is_off(config.get("lora_target_parameters")):
        hint = "write lora_target_linear: true, or list names in lora_target_modules"
        yield Lack(
            key="lora_target_modules", message="expected something for the adapter to adapt, found none", hint=hint
        )


def _no_adapter(config: Config) -> Iterator[Lack]:
    hint = "write adapter: lora, or adapter: qlora on a 4-bit base; --force writes a recipe that trains a LoRA adapter"
    if any(path[0] == "quantization" for path in spelled(config).tables):
        message = "expected an adapter: the quantized base is frozen, and only a LoRA adapter can be trained"
    else:
        message = "expected an adapter, found none: quantune does not train all weights of a model but a LoRA adapter"
    yield Lack(key="adapter", message=message, hint=hint)
