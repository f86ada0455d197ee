"""What quantization-aware training and training weights in full say together with the other keys."""

from __future__ import annotations

import json
from collections.abc import Iterable

from quantune.recipe.schema import AdapterConfig, QuantizationConfig, TrainingConfig
from quantune.recipe.structure import Finding

OF_LORA = (
    *("r", "alpha", "dropout", "use_rslora", "use_dora", "init", "loftq_iterations", "bias"),
    "target_parameters",
)
"""Keys of `[adapter]` that say how an update of low rank is made."""


def check_full(
    adapter: AdapterConfig, training: TrainingConfig, quantization: QuantizationConfig | None
) -> Iterable[Finding]:
    """What `type = "full"` can't be combined with."""
    if adapter.type != "full":
        return
    unset = AdapterConfig()
    for key in OF_LORA:
        if getattr(adapter, key) != getattr(unset, key):
            yield Finding(
                code="QT021",
                path=("adapter", key),
                message=f'{key} belongs to type = "lora" and has no meaning for type = "full"',
                hint="remove one of them",
                other=("adapter", "type"),
            )
    if training.loraplus_lr_ratio is not None:
        message = 'loraplus_lr_ratio is about the B matrices of LoRA, which [adapter] type = "full" does not have'
        yield Finding(code="QT021", path=("training", "loraplus_lr_ratio"), message=message, other=("adapter", "type"))
    if quantization is not None and training.qat is None:
        yield Finding(
            code="QT020",
            path=("adapter", "type"),
            message='type = "full" trains weights that [quantization] packs, and packed weights can\'t be trained',
            hint='add [training.qat] to train them for that format, use type = "lora", or leave [quantization] out',
            other=("quantization",),
        )


def check_qat(
    training: TrainingConfig, adapter: AdapterConfig, quantization: QuantizationConfig | None
) -> Iterable[Finding]:
    """What `[training.qat]` needs, and what it can't be combined with."""
    qat, at = training.qat, ("training", "qat")
    if qat is None:
        return
    if quantization is None:
        message = "qat trains for the format of [quantization], and there is none"
        yield Finding(code="QT022", path=at, message=message, hint="add [quantization], or remove [training.qat]")
    else:
        yield from _activations(training, quantization)
    if training.compile:
        yield Finding(
            code="QT020",
            path=("training", "compile"),
            message="compile = true makes one graph of a block, and rounding packs each weight outside of graphs",
            hint="remove one of them",
            other=at,
        )
    if adapter.dropout > 0:
        yield Finding(
            code="QT020",
            path=("adapter", "dropout"),
            message=f"dropout = {adapter.dropout} gives the adapter other inputs than the base, and qat rounds the sum "
            "of both, which has one input",
            hint="use dropout = 0.0, or remove [training.qat]",
            other=at,
        )
    if qat.lora_base == "packed" and adapter.type == "full":
        message = 'lora_base is about adapters of type = "lora", and this one is of type = "full"'
        yield Finding(code="QT021", path=(*at, "lora_base"), message=message, other=("adapter", "type"))
    elif qat.lora_base == "dense" and adapter.init == "loftq":
        yield Finding(
            code="QT020",
            path=("adapter", "init"),
            message='init = "loftq" makes up for what packing the base loses, and lora_base = "dense" does not pack it',
            hint='use init = "default", or lora_base = "packed"',
            other=(*at, "lora_base"),
        )
    if training.max_steps is not None and qat.fake_quant_after_steps >= training.max_steps:
        yield Finding(
            code="QT020",
            path=(*at, "fake_quant_after_steps"),
            message=f"fake_quant_after_steps = {qat.fake_quant_after_steps} never comes within max_steps = "
            f"{training.max_steps}",
            hint="use fewer steps, or remove [training.qat]",
            other=("training", "max_steps"),
        )


def _activations(training: TrainingConfig, quantization: QuantizationConfig) -> Iterable[Finding]:
    """Inputs are rounded only where a reader of the format rounds them so; options say what theirs do."""
    wanted = None if training.qat is None else training.qat.activation_dtype
    options = quantization.options
    read = options.activation_dtypes() if hasattr(options, "activation_dtypes") else ()
    if wanted is None or wanted in read:
        return
    dtype = getattr(options, "weight_dtype", None)
    format_ = f'backend = "{quantization.backend}"' + (f', weight_dtype = "{dtype}"' if dtype else "")
    others = " or ".join(json.dumps(one) for one in read)
    unasked = options.activations_when_read() if hasattr(options, "activations_when_read") else None
    message = f'no reader of {format_} rounds activations to "{wanted}"' + (
        f", only to {others}" if read else "; it leaves them as they are"
    )
    if unasked is not None:
        message = f'no reader of {format_} can be told to round activations to "{wanted}": {unasked}, in a way of '
        message += "their own that training does not have"
    yield Finding(
        code="QT020",
        path=("training", "qat", "activation_dtype"),
        message=message,
        hint='leave activation_dtype out, or use backend = "torchao" with weight_dtype = '
        f'"{wanted}" and a scale for each row',
        other=("quantization",),
    )
