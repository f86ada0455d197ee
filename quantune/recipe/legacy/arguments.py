"""Arguments of transformers' own config classes: `bnb_config_kwargs`, `config_kwargs` and their like.

Those of `BitsAndBytesConfig` are settings of backend "bnb"; those of `Mxfp4Config` and `FineGrainedFP8Config` are
settings of "mxfp4" and "fp8".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from quantune.recipe.legacy.claims import toml
from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding, describe

COMPUTE_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}
SWITCHES = ("load_in_4bit", "load_in_8bit")
"""Keys that mean the same among the arguments and beside them; read with those beside them."""


@attrs.define(kw_only=True)
class Arguments:
    """What a table of arguments comes to."""

    says: dict[str, Any] = attrs.field(factory=dict)
    """Keys of `[quantization]`."""
    precision: str | None = None
    """`[training] precision`."""
    notes: list[str] = attrs.field(factory=list)
    """What needs no key, and why."""
    findings: list[Finding] = attrs.field(factory=list)
    places: dict[str, Path] = attrs.field(factory=dict)
    """Where each of `says` and the precision is written."""


Result = tuple[str, Any] | str | None
"""A key and its value, or a note, or nothing."""


class _Refused(Exception):
    """An argument can't be translated: code, message, hint."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.hint = code, hint


def of_bitsandbytes(path: Path, given: Any) -> Arguments:
    """Translate `bnb_config_kwargs`, the arguments of `BitsAndBytesConfig`."""
    if isinstance(given, dict):
        given = {key: value for key, value in given.items() if key not in SWITCHES}
    return _translate(path, given, _BITSANDBYTES)


def of_config(path: Path, backend: str, given: Any) -> Arguments:
    """Translate the arguments of `Mxfp4Config` or `FineGrainedFP8Config`."""
    return _translate(path, given, _CONFIGS[backend])


def _translate(path: Path, given: Any, rules: Mapping[str, Callable[[str, Any], Result]]) -> Arguments:
    made = Arguments()
    if not isinstance(given, dict):
        made.findings.append(Finding(code="QT013", path=path, message=f"expected a table, found {describe(given)}"))
        return made
    for key, value in given.items():
        if key not in rules:
            close = difflib.get_close_matches(str(key), rules, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"understood are: {', '.join(rules)}"
            message = f"unknown key {toml(str(key))}"
            made.findings.append(Finding(code="QT012", path=(*path, key), message=message, hint=hint))
            continue
        if value is None:
            continue
        try:
            result = rules[key](key, value)
        except _Refused as error:
            finding = Finding(code=error.code, path=(*path, key), message=str(error), hint=error.hint)
            made.findings.append(finding)
            continue
        if isinstance(result, str):
            made.notes.append(result)
        elif result is not None and result[0] == "precision":
            made.precision = result[1]
            made.places["precision"] = (*path, key)
        elif result is not None:
            made.says[result[0]] = result[1]
            made.places[result[0]] = (*path, key)
    return made


def _list_of_names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _Refused("QT013", f"expected a list of strings, found {describe(value)}")
    return value


def _true_or_false(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Refused("QT013", f"expected true or false, found {describe(value)}")
    return value


def _skip(key: str, value: Any) -> Result:
    names = _list_of_names(key, value)
    return ("skip", names) if names else None


def _dequantize(key: str, value: Any) -> Result:
    if _true_or_false(key, value):
        raise _Refused(
            "QT021",
            "dequantize = true would train on the base in full precision",
            "leave [quantization] out to do that; with it, weights stay packed",
        )
    return None


def _no_block_size(key: str, value: Any) -> Result:
    raise _Refused("QT021", 'weight_block_size has no meaning for backend "mxfp4"', "its blocks are 32 weights")


def _quant_type(key: str, value: Any) -> Result:
    if value not in ("nf4", "fp4"):
        raise _Refused("QT013", f'expected "nf4" or "fp4", found {describe(value)}')
    return "weight_dtype", value


def _compute_dtype(key: str, value: Any) -> Result:
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    if name not in COMPUTE_DTYPES:
        message = f'expected "bfloat16" or "float32", found {describe(value)}'
        raise _Refused("QT013", message, 'quantune computes in bf16 or fp32: [training] precision, "auto" by default')
    return "precision", COMPUTE_DTYPES[name]


def _off(meaning: str) -> Callable[[str, Any], Result]:
    def rule(key: str, value: Any) -> Result:
        if _true_or_false(key, value):
            raise _Refused("QT021", f"{key} = true {meaning}", "leave it out")
        return None

    return rule


def _needless(kind: type | tuple[type, ...], expected: str, note: str) -> Callable[[str, Any], Result]:
    def rule(key: str, value: Any) -> Result:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _Refused("QT013", f"expected {expected}, found {describe(value)}")
        return f"{key} needs no key: {note}"

    return rule


_BITSANDBYTES: dict[str, Callable[[str, Any], Result]] = {
    "bnb_4bit_quant_type": _quant_type,
    "bnb_4bit_use_double_quant": lambda key, value: ("double_quant", _true_or_false(key, value)),
    "bnb_4bit_compute_dtype": _compute_dtype,
    "bnb_4bit_quant_storage": _needless(str, "a string", "packed weights are stored as uint8, and shard as that"),
    "llm_int8_threshold": _needless(
        (int, float), "a number", "activations are never quantized, so none is too large for it"
    ),
    "llm_int8_skip_modules": _skip,
    "llm_int8_enable_fp32_cpu_offload": _off("keeps modules on the CPU, which quantune does not"),
    "llm_int8_has_fp16_weight": _off("trains the weights themselves, and quantune's base is frozen"),
}
_CONFIGS: dict[str, dict[str, Callable[[str, Any], Result]]] = {
    "mxfp4": {
        "dequantize": _dequantize,
        "modules_to_not_convert": _skip,
        "weight_block_size": _no_block_size,
    },
    "fp8": {
        "dequantize": _dequantize,
        "modules_to_not_convert": _skip,
        "weight_block_size": lambda key, value: ("block_size", value),
    },
}
UNDERSTOOD: dict[str, tuple[str, ...]] = {
    "bnb": (*_BITSANDBYTES, *SWITCHES),
    **{backend: tuple(rules) for backend, rules in _CONFIGS.items()},
}
"""The arguments that are known, by the backend they are of."""
