"""The table of all rules, and which of them covers a key."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from quantune.recipe.migrate import adapter, data, datasets, model, other, qat, quantization, run, training
from quantune.recipe.migrate.reading import Path, _Index
from quantune.recipe.migrate.rule import Rule

GROUPS: dict[str, tuple[Rule, ...]] = {
    "Model": model.RULES,
    "Data": (*datasets.RULES, *data.RULES),
    "Adapter": adapter.RULES,
    "Quantization": (*quantization.RULES, *qat.RULES),
    "Training": training.RULES,
    "Run": run.RULES,
    "Kernels, plugins, other methods": other.RULES,
}
RULES: tuple[Rule, ...] = tuple(rule for rules in GROUPS.values() for rule in rules)


MEANT = {
    "cutoff_len": "sequence_len",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr_scheduler_type": "lr_scheduler",
    "max_seq_length": "sequence_len",
    "model_name_or_path": "base_model",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "quantization_bit": "load_in_4bit",
    "target_modules": "lora_target_modules",
    "train_batch_size": "micro_batch_size",
}
"""What other tools call a known key, where the spelling does not tell."""


def _by_key() -> dict[str, Rule]:
    table: dict[str, Rule] = {}
    for rule in RULES:
        for key in rule.keys:
            assert key not in table, f"two rules for {key}"
            table[key] = rule
    return table


BY_KEY = MappingProxyType(_by_key())
_BELOW = {key.removesuffix(".**"): rule for key, rule in BY_KEY.items() if key.endswith(".**")}
_ONE_BELOW = {key.removesuffix(".*"): rule for key, rule in BY_KEY.items() if key.endswith(".*")}
_EXACT = {key: rule for key, rule in BY_KEY.items() if not key.endswith("*")}


def _containers() -> frozenset[str]:
    """Keys that hold others, e.g. `datasets`, `datasets[]`, `fsdp_config`."""
    found: set[str] = set()
    for key in BY_KEY:
        cut = len(key)
        while (cut := max(key.rfind(".", 0, cut), key.rfind("[", 0, cut))) > 0:
            found.add(key[:cut])
    return frozenset(found)


CONTAINERS = _containers()


def pattern(path: Path) -> str:
    """The path as rules name it: an index is `[]`, and a key that itself has a dot or a bracket is no path."""
    text = ""
    for part in path:
        name = f"{part}".translate(_ESCAPED)
        text += "[]" if isinstance(part, _Index) else f".{name}"
    return text[1:]


_ESCAPED = {ord(sign): f"\\{sign}" for sign in ".[]*"}


def rule_for(path: Path) -> Rule | None:
    """The rule that covers a key."""
    if not all(isinstance(part, str | _Index) for part in path):
        return None if len(path) == 1 else _rule_below(path)
    return _EXACT.get(pattern(path)) or _ONE_BELOW.get(pattern(path[:-1])) or _rule_below(path)


def _rule_below(path: Path) -> Rule | None:
    for length in range(len(path) - 1, 0, -1):
        if pattern(path[:length]) in _BELOW:
            return _BELOW[pattern(path[:length])]
    return None


def takes_a_value(path: Path) -> bool:
    """Whether a key above this one is one that takes a value and holds no keys."""
    above = [pattern(path[:length]) for length in range(1, len(path))]
    return any(key in _EXACT and not any(other.startswith(f"{key}.") for other in _EXACT) for key in above)


def suggestion(path: Path) -> str | None:
    """The known key that was probably meant, as it is written."""
    spelled, above = pattern(path), pattern(path[:-1])
    if spelled in MEANT:
        return MEANT[spelled]
    last = pattern(path[-1:])
    known = [key for key in BY_KEY if not key.endswith("*")] + [key for key in CONTAINERS if not key.endswith("[]")]
    beside = {key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == above}
    close = difflib.get_close_matches(last, sorted(beside), n=1, cutoff=0.78)
    return close[0] if close else None
