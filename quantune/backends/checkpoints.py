"""Checkpoints that are quantized already: what their `config.json` says, and which backend takes it over.

Works on plain values and needs no torch, so that `quantune check` knows of a local base what a run would find out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from quantune.backends import registry
from quantune.backends.discovery import plain
from quantune.recipe.positions import Path
from quantune.recipe.schema import QuantizationConfig, Recipe
from quantune.recipe.structure import Finding

BITSANDBYTES = "bitsandbytes"
LONGEST_NAME = 40
UNCHANGING = ("default", "gaussian")
"""Initializations of an adapter that leave the base's weights as they are."""


def stored_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a `config.json` says of its quantization, also for a text model within another; None where it is nothing."""
    for table in (config, config.get("text_config")):
        found = table.get("quantization_config") if isinstance(table, Mapping) else None
        if isinstance(found, Mapping):
            return dict(found)
    return None


def method_of(stored: Mapping[str, Any]) -> str | None:
    """The quantization method, which bitsandbytes' own settings stand for as well."""
    method = stored.get("quant_method")
    if isinstance(method, str):
        return method
    return BITSANDBYTES if stored.get("load_in_4bit") is True or stored.get("load_in_8bit") is True else None


def holds(stored: Mapping[str, Any]) -> str:
    """What a checkpoint holds, for people: its method and what else it says, e.g. `awq, 4 bits, groups of 128`."""
    method = method_of(stored)
    if method is None:
        return "its config.json names no method"
    words = [plain(method, LONGEST_NAME)]
    if method == BITSANDBYTES:
        in_4_bit = stored.get("load_in_4bit") is True
        words.append(_text(stored.get("bnb_4bit_quant_type"), "fp4") if in_4_bit else "int8")
    elif isinstance(stored.get("format"), str):
        words.append(_text(stored["format"], ""))
    bits, group_size = stored.get("bits"), stored.get("group_size")
    if isinstance(bits, int):
        words.append(f"{bits} bits")
    if isinstance(group_size, int) and group_size > 0:
        words.append(f"groups of {group_size}")
    return ", ".join(words)


def adopters(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """The built-in backends that take over what a checkpoint holds."""
    method = method_of(stored)
    return tuple(name for name in registry.BUILT_IN if method in registry.describe(name).adopts)


def adopted_as(stored: Mapping[str, Any]) -> QuantizationConfig | None:
    """What `[quantization]` would say of a checkpoint taken over as it is; None where no backend does."""
    for name in adopters(stored):
        return QuantizationConfig(backend=name, options=registry.options_of(name)())
    return None


def format_problem(stored: Mapping[str, Any], quantization: QuantizationConfig | None) -> tuple[str, str | None] | None:
    """Why a run can't train on a checkpoint that is quantized already, and the ways out; None where it can.

    Without `quantization` the base stays as it is: a backend takes it over where there is one for its format.
    """
    found = f"the base is already quantized ({holds(stored)})"
    taking_over = adopters(stored)
    if quantization is None and not taking_over:
        return f"{found}, and no backend trains on that as it is", "choose the unquantized base"
    wanted = adopted_as(stored) if quantization is None else quantization
    assert wanted is not None
    if method_of(stored) not in registry.describe(wanted.backend).adopts:
        as_it_is = "leave [quantization] out to train on it as it is, or " if taking_over else ""
        message = f'{found}, and [quantization] asks for backend = "{wanted.backend}"'
        return message, f"{as_it_is}choose the unquantized base"
    problem = wanted.options.checkpoint_problem(stored)
    if problem is None:
        return None
    hint = f'it is taken over with [quantization] backend = "{wanted.backend}"' if quantization is None else None
    return f"{found}, and {problem}", hint


def checkpoint_problems(config: Mapping[str, Any], recipe: Recipe) -> Iterable[Finding]:
    """What of a base's `config.json` does not go together with a recipe."""
    stored = stored_quantization(config)
    if stored is None:
        return
    problem = format_problem(stored, recipe.quantization)
    base: Path = ("model", "base")
    if problem is not None:
        finding = Finding(code="QT150", path=base, message=problem[0], hint=problem[1])
        if recipe.quantization is not None:
            finding = attrs.evolve(finding, other=("quantization", "backend"), other_label="and this packs it anew")
        yield finding
    elif recipe.adapter.init not in UNCHANGING:
        yield Finding(
            code="QT020",
            path=("adapter", "init"),
            message=f'init = "{recipe.adapter.init}" changes the weights before they are packed, and the base is '
            f"already quantized ({holds(stored)})",
            hint='use init = "default", or choose the unquantized base',
            other=base,
            other_label="this base",
        )


def _text(value: Any, default: str) -> str:
    return plain(value, LONGEST_NAME) if isinstance(value, str) else default
