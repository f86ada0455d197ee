"""Checkpoints that are already quantized: what their `config.json` says, and which backend takes them over.

Needs no torch: a recipe is held against a base's `config.json` before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from quantune.backends import registry
from quantune.backends.discovery import plain
from quantune.recipe.schema import QuantizationConfig

EXCLUSIONS = ("modules_to_not_convert", "llm_int8_skip_modules", "exclude", "ignore", "ignored_layers")
"""What quantization methods call the modules they leave in full precision."""

ROUNDING_ACTIVATIONS = {
    "Int8DynamicActivationInt8WeightConfig": "int8",
    "Float8DynamicActivationFloat8WeightConfig": "fp8",
}
"""torchao's configurations of readers that round activations."""


@attrs.frozen(kw_only=True)
class FormatProblem:
    """Why a recipe can't have a base that is already quantized."""

    code: str
    message: str
    """What the checkpoint holds, and what the recipe says."""
    way_out: str


def quant_method(stored: Mapping[str, Any]) -> str | None:
    """The name of the method, where the checkpoint says it; old bitsandbytes checkpoints only say how many bits."""
    method = stored.get("quant_method")
    if method is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method) if method is not None else None


def stored_activation_dtype(stored: Mapping[str, Any]) -> str | None:
    """What the reader of a quantized checkpoint rounds activations to, where its config says so as torchao's does."""
    written = json.dumps(stored, default=str)
    return next((dtype for kind, dtype in ROUNDING_ACTIVATIONS.items() if kind in written), None)


def in_words(stored: Mapping[str, Any]) -> str:
    """What a checkpoint holds, e.g. `quark, but for 2 modules, e.g. lm_head`."""
    method = quant_method(stored)
    words = "its config.json names no method" if method is None else plain(method, 40)
    kept: list[Any] = next((stored[key] for key in EXCLUSIONS if isinstance(stored.get(key), list) and stored[key]), [])
    if kept:
        first = plain(str(kept[0]), 80)
        words += f", but for {first}" if len(kept) == 1 else f", but for {len(kept)} modules, e.g. {first}"
    return words


def format_problem(stored: Mapping[str, Any], quantization: QuantizationConfig | None) -> FormatProblem | None:
    """Why `quantization` does not fit a checkpoint whose `config.json` says `stored` of its own; None if it does.

    A recipe without `[quantization]` takes the checkpoint as it is, where a built-in backend has its format.
    """
    holds = f"is already quantized ({in_words(stored)})"
    whole = as_stored(stored)
    if quantization is None and whole is None:
        *names, last = (name for name in registry.BUILT_IN if registry.describe(name).adopts)
        return FormatProblem(
            code="QT123",
            message=f"{holds}, and quantune can't train on that: of quantized checkpoints it takes over those in "
            f"the formats of {', '.join(names)} and {last}",
            way_out="choose the unquantized base; [quantization] packs it",
        )
    chosen = whole if quantization is None else quantization
    assert chosen is not None
    ways_out = ["choose the unquantized base"]
    if quantization is not None and whole is not None and whole.options.checkpoint_problem(stored) is None:
        ways_out.insert(0, f"drop [quantization] to take it over as it is (backend = {json.dumps(whole.backend)})")
    if quant_method(stored) not in registry.describe(chosen.backend).adopts:
        message = f"{holds}, and the recipe asks for backend = {json.dumps(chosen.backend)}"
        return FormatProblem(code="QT122", message=message, way_out=", or ".join(ways_out))
    problem = chosen.options.checkpoint_problem(stored)
    if problem is None:
        return None
    return FormatProblem(code="QT122", message=f"{holds}: {problem}", way_out=", or ".join(ways_out))


def as_stored(stored: Mapping[str, Any]) -> QuantizationConfig | None:
    """`[quantization]` that takes a checkpoint over as it is; None where no built-in backend has its format."""
    backend = _adopting(stored)
    if backend is None:
        return None
    cls = registry.describe(backend).options
    of_checkpoint = getattr(cls, "of_checkpoint", None)
    options = cls() if of_checkpoint is None else of_checkpoint(stored)
    return None if options is None else QuantizationConfig(backend=backend, options=options)


def _adopting(stored: Mapping[str, Any]) -> str | None:
    """The built-in backend that takes over checkpoints of this method."""
    method = quant_method(stored)
    return next((name for name in registry.BUILT_IN if method in registry.describe(name).adopts), None)
