"""Rules for `qat`, quantization-aware training.

There it trains all weights of a base that is stored as it is, for a format of its own. Here [quantization] names the
format, and what is trained, an adapter or the weights of all linear layers, is rounded to it.
"""

from __future__ import annotations

from typing import Any

from quantune.recipe.migrate.quantization import is_quantized, said_of_foreign
from quantune.recipe.migrate.rule import Config, Leaf, Outcome, Rule, drop, refuse, same, translate, write, writes
from quantune.recipe.migrate.values import flag, is_off, text, whole

FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"backend": "torchao", "weight_dtype": "int4"},
    "int8": {"backend": "torchao", "weight_dtype": "int8"},
    "float8_e4m3fn": {"backend": "torchao", "weight_dtype": "fp8"},
    "fp8": {"backend": "torchao", "weight_dtype": "fp8"},
    "float8": {"backend": "torchao", "weight_dtype": "fp8"},
    "nf4": {"backend": "torchao", "weight_dtype": "nf4"},
    "nvfp4": {"backend": "torchao", "weight_dtype": "nvfp4"},
    "mxfp4": {"backend": "mxfp4"},
}
"""`[quantization]` by what `qat.weight_dtype` is there."""
ACTIVATIONS = {"int8": "int8", "float8_e4m3fn": "fp8", "fp8": "fp8", "float8": "fp8"}
"""`activation_dtype` of [training.qat] by what it is there."""
AFTER = "training.qat.fake_quant_after_steps"
GROUP_SIZE = 32
"""The default there."""
_ADAPTER_GIVEN = "layers without an adapter are packed in this format too, and not only rounded in the end"
_ALL_WEIGHTS = "the weights of all linear layers are trained; embeddings, norms and the output head stay as they are"


def trains(config: Config) -> bool:
    """Whether `qat` names a format that a recipe can train for, and nothing else in the document names one."""
    table = config.get("qat")
    return (
        isinstance(table, dict)
        and str(table.get("weight_dtype")).lower() in FORMATS
        and not is_quantized(config)
        and said_of_foreign(config, "gptq") is None
    )


def trains_all_weights(config: Config) -> bool:
    """Whether there is `qat` and no adapter."""
    return trains(config) and is_off(config.get("adapter"))


def qat_format(config: Config) -> dict[str, Any]:
    """Keys of `[quantization]` that say the format to train for, where `qat` names one."""
    return FORMATS[str(config.get("qat")["weight_dtype"]).lower()]


def _steps(config: Config) -> int:
    steps = config.get("qat").get("fake_quant_after_n_steps")
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else 0


def _of_qat(leaf: Leaf) -> Outcome | None:
    """What becomes of any key of a table that is off, or that a recipe can't say; None where it can."""
    if is_off(leaf.config.get("qat")) or is_off(leaf.value) and leaf.name != "weight_dtype":
        return same()
    if trains(leaf.config):
        return None
    if said_of_foreign(leaf.config, "gptq") is not None:
        return refuse("a GPTQ checkpoint's weights are packed already")
    said = said_of_foreign(leaf.config, "qat") if is_quantized(leaf.config) else None
    return refuse(said or f"expected one of {', '.join(FORMATS)} as qat.weight_dtype, which is the format to train for")


def _weight_dtype(leaf: Leaf) -> Outcome:
    text(leaf.value)
    found = _of_qat(leaf)
    if found is not None:
        return found
    keys: dict[Any, Any] = {("quantization", key): value for key, value in qat_format(leaf.config).items()}
    if trains_all_weights(leaf.config):
        return writes({**keys, "adapter.type": "full", AFTER: _steps(leaf.config)}, _ALL_WEIGHTS, changed=True)
    return writes({**keys, AFTER: _steps(leaf.config)}, _ADAPTER_GIVEN, changed=True)


def _group_size(leaf: Leaf) -> Outcome:
    size = whole(leaf.value)
    found = _of_qat(leaf)
    if found is not None:
        return found
    if qat_format(leaf.config).get("weight_dtype") == "int4":
        return write("quantization.group_size", size)
    return drop("this format has groups of its own")


def _activation_dtype(leaf: Leaf) -> Outcome:
    name = text(leaf.value).lower()
    found = _of_qat(leaf)
    if found is not None:
        return found
    wanted, weights = ACTIVATIONS.get(name), qat_format(leaf.config).get("weight_dtype", "mxfp4")
    if wanted is None or weights != wanted:
        return refuse(
            f"no reader of {weights} weights rounds activations to {name} here; int8 goes with int8 weights, fp8 with "
            "fp8 ones"
        )
    return write("training.qat.activation_dtype", wanted)


def _after_steps(leaf: Leaf) -> Outcome:
    steps = whole(leaf.value)
    found = _of_qat(leaf)
    if found is not None:
        return found
    last = leaf.config.whole("max_steps")
    if last and steps >= last:
        return refuse(f"rounding never begins within max_steps: {last}; name fewer steps, or leave qat out")
    return write(AFTER, steps)


def _embedding(leaf: Leaf) -> Outcome:
    return refuse("embeddings stay in full precision") if flag(leaf.value) else same()


def _table(leaf: Leaf) -> Outcome:
    return same() if is_off(leaf.value) else refuse("expected a table with weight_dtype, the format to train for")


RULES: tuple[Rule, ...] = (
    Rule(keys=("qat",), treatment="refuse", meaning="a table says which format to train for", apply=_table),
    translate("qat.weight_dtype", to="`[training.qat]`, and `[quantization]` in that format", by=_weight_dtype),
    translate("qat.group_size", to="`quantization.group_size`", by=_group_size),
    translate("qat.activation_dtype", to="`training.qat.activation_dtype`", by=_activation_dtype),
    translate("qat.fake_quant_after_n_steps", to="`training.qat.fake_quant_after_steps`", by=_after_steps),
    translate("qat.quantize_embedding", to="nothing: embeddings stay in full precision", by=_embedding),
)
