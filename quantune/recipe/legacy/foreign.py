"""Keys of methods that quantune does not have, which older configs combine with a quantized base or leave lying about.

Switched off they say nothing. Switched on they contradict a quantized base, and mean nothing here without one.
"""

from __future__ import annotations

from typing import Any

import attrs

from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding

PTQ_KEYS = ("activation_dtype", "quantize_embedding")
"""Keys that only a block of post-training quantization has."""
PTQ_SHARED = ("weight_dtype", "group_size")
"""Keys that it shares with a table of quantune's that lacks its backend."""


@attrs.frozen(kw_only=True)
class Foreign:
    """A key that asks for what quantune doesn't do."""

    code: str
    asks: str
    """What it asks for."""
    against: str
    """Why that can't be had over a quantized base."""
    way_out: str
    alone: str = "quantune does not do that"
    """What is said of it where nothing quantizes the base."""


FOREIGN = {
    "gptq": Foreign(
        code="QT110",
        asks="asks to train on a GPTQ checkpoint",
        against="a GPTQ checkpoint's weights are packed already",
        way_out="choose the unquantized base and [quantization], and remove gptq",
    ),
    "qat": Foreign(
        code="QT111",
        asks="asks for quantization-aware training in other tools' words",
        against="it would name a format twice",
        way_out="write [training.qat], which trains for the format of [quantization], and remove qat",
        alone="here it trains for the format of [quantization]",
    ),
    "quantization": Foreign(
        code="QT112",
        asks="without a backend is other tools' post-training quantization, which runs after training",
        against="the base is packed before it",
        way_out="remove it; how the base is stored in training is [quantization] backend = ...",
    ),
    "fp8": Foreign(
        code="QT113",
        asks="asks for fp8 arithmetic in training",
        against="packed weights are dequantized and multiplied in the compute dtype",
        way_out='remove fp8; fp8 weights are [quantization] backend = "torchao", weight_dtype = "fp8"',
    ),
    "relora": Foreign(
        code="QT114",
        asks="asks for ReLoRA, which merges the adapter into the base again and again",
        against="a quantized base would be packed anew, and change, each time",
        way_out="remove relora; a larger [adapter] r reaches further",
    ),
    "merge_lora": Foreign(
        code="QT115",
        asks="asks to merge the adapter when training ends",
        against="merging is a step of its own, which verifies what it wrote",
        way_out="remove merge_lora: the run saves the adapter by itself, and quantune merge RUN merges it",
    ),
}


def is_post_training_block(document: dict[str, Any], *, beside_others: bool) -> bool:
    """Whether `quantization` is other tools' block of that name; `beside_others`: another key names the backend."""
    table = document.get("quantization")
    if not isinstance(table, dict) or "backend" in table:
        return False
    return any(key in table for key in PTQ_KEYS) or (beside_others and any(key in table for key in PTQ_SHARED))


def refusal(key: str, written: str, base: tuple[Path, str] | None) -> Finding:
    """What is wrong with a foreign key that is switched on; `base` is the key that quantizes the base, if any."""
    foreign = FOREIGN[key]
    where, text = (None, "") if base is None else base
    why = foreign.alone if base is None else f"beside {text}, {foreign.against}"
    return Finding(
        code=foreign.code,
        path=(key,),
        message=f"{written} {foreign.asks}; {why}",
        hint=foreign.way_out,
        other=where,
        other_label="quantizes the base" if base is not None else "",
    )
