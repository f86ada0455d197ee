"""A base's configuration with a recipe's values in the place of its own, `[model.config]`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from quantune.errors import ModelError

ROPE, ROPE_BEFORE = "rope_parameters", ("rope_scaling", "rope_theta")
"""What transformers calls the settings of rotary embeddings now, and what `config.json` files called them before."""
ROPE_KEYS = frozenset(RopeParameters.__annotations__)


def with_values(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration with `values` in it; tables merge with what is there.

    Raises:
        ModelError: a key is unknown, or the architecture refuses a value.
    """
    if not values:
        return config
    merged = _merged(config, values, "[model.config]")
    try:
        made = type(config).from_dict(merged)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise ModelError(f"[model.config] does not fit {type(config).__name__}: {reason}") from error
    made._commit_hash = getattr(config, "_commit_hash", None)
    return made


def _merged(config: PretrainedConfig, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = config.to_dict()
    for written, value in values.items():
        key = config.attribute_map.get(written, written)
        if ROPE in merged and key in (ROPE, *ROPE_BEFORE):
            table = {"rope_theta": value} if key == "rope_theta" else _table(value, f"{where} {written}")
            merged[ROPE] = _merged_rope(merged[ROPE] or {}, table, f"{where} {written}")
        elif key not in merged:
            raise ModelError(f"{where}: the base's configuration has no {written}{_did_you_mean(written, merged)}")
        elif isinstance(getattr(config, key, None), PretrainedConfig):
            merged[key] = _merged(getattr(config, key), _table(value, f"{where} {written}"), f"{where} {written}")
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _merged_rope(present: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of rotary embeddings; those of another type than before keep only its base frequency."""
    by_layer = [key for key, value in present.items() if isinstance(value, Mapping)]
    if by_layer:  # one table for each type of layer
        unknown = [key for key in values if key not in by_layer]
        if unknown:
            raise ModelError(f"{where}: expected a table for {' or '.join(by_layer)}, found {unknown[0]}")
        tables = {key: _merged_rope(present[key], _table(value, where), where) for key, value in values.items()}
        return {**present, **tables}
    values = {("rope_type" if key == "type" else key): value for key, value in values.items()}
    for key in values:
        if key not in ROPE_KEYS and key not in present:
            raise ModelError(f"{where}: rotary embeddings have no {key}{_did_you_mean(key, ROPE_KEYS)}")
    wanted = values.get("rope_type", present.get("rope_type"))
    if wanted != present.get("rope_type"):
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if wanted not in known:
            raise ModelError(f"{where}: expected rope_type as one of {', '.join(known)}, found {wanted!r}")
        present = {key: present[key] for key in ("rope_theta", "partial_rotary_factor") if key in present}
    return {**present, **values}


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: expected a table, found {value!r}")
    return value


def _did_you_mean(word: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [option for option in options if not option.startswith("_")], n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
