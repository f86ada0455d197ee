"""What several values of a recipe say together: pure functions from a recipe to findings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

import attrs

from quantune.recipe.qat_conflicts import check_full, check_qat
from quantune.recipe.schema import (
    ALL_LINEAR,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    QuantizationConfig,
    Recipe,
    TrainingConfig,
)
from quantune.recipe.source_conflicts import check_data, check_sources, one_of
from quantune.recipe.structure import Finding, quoted


def check(recipe: Recipe) -> list[Finding]:
    """Every contradiction in the recipe, whatever the order of its keys."""
    return check_sections({field.name: getattr(recipe, field.name) for field in attrs.fields(Recipe)})


def check_sections(sections: Mapping[str, Any]) -> list[Finding]:
    """Every contradiction among the sections given; a rule that reads a section which is not given is left out."""
    findings: list[Finding] = []
    for names, rule in _RULES:
        if all(name in sections for name in names):
            findings += rule(*(sections[name] for name in names))
    return findings


def _training(training: TrainingConfig) -> Iterable[Finding]:
    if training.max_steps is not None and training.epochs is not None:
        message = "epochs and max_steps both set the length of the run"
        yield one_of(("training", "epochs"), ("training", "max_steps"), message)
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        message = "warmup_ratio and warmup_steps both set the warm-up"
        yield one_of(("training", "warmup_ratio"), ("training", "warmup_steps"), message)
    if training.warmup_steps and training.max_steps and training.warmup_steps >= training.max_steps:
        yield Finding(
            code="QT020",
            path=("training", "warmup_steps"),
            message=f"a warm-up of {training.warmup_steps} steps does not end within max_steps = {training.max_steps}",
            hint="use fewer warmup_steps, or warmup_ratio, a fraction of all steps",
            other=("training", "max_steps"),
        )
    if isinstance(training.micro_batch_size, int) and training.batch_size % training.micro_batch_size:
        yield Finding(
            code="QT020",
            path=("training", "micro_batch_size"),
            message=f"micro_batch_size = {training.micro_batch_size} does not divide batch_size = "
            f"{training.batch_size}",
            hint=_divisors_in_words(training.batch_size),
            other=("training", "batch_size"),
        )


def _divisors_in_words(number: int, shown: int = 12) -> str:
    small = [n for n in range(1, min(math.isqrt(number), 100_000) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    if len(divisors) <= shown:
        return f"one of {', '.join(map(str, divisors))} does"
    return f"one of {', '.join(map(str, divisors[:shown]))} or a larger divisor does"


def _evaluation(evaluation: EvaluationConfig, data: DataConfig) -> Iterable[Finding]:
    sources = data.train if data.eval_size is not None else data.eval
    if not sources:
        for key in ("at_start", "every_steps", "per_epoch", "exact_match"):
            if getattr(evaluation, key):
                message = f"{key} asks for an evaluation, and there is nothing to evaluate on"
                hint = "add [[data.eval]], or set [data] eval_size"
                yield Finding(code="QT022", path=("evaluation", key), message=message, hint=hint)
    elif evaluation.exact_match and all(source.format == "completion" for source in sources):
        yield Finding(
            code="QT022",
            path=("evaluation", "exact_match"),
            message="exact_match compares answers to prompts, and completion data has neither",
            hint='use format = "chat" or "instruct" in ' + ("[[data.eval]]" if data.eval else "[[data.train]]"),
        )


def _model(model: ModelConfig) -> Iterable[Finding]:
    if model.base.startswith("builtin:"):
        for key in ("trust_remote_code", "revision"):
            if getattr(model, key):
                message = f"{key} has no meaning for a built-in model"
                yield Finding(code="QT021", path=("model", key), message=message)


def _loftq(adapter: AdapterConfig, quantization: QuantizationConfig | None) -> Iterable[Finding]:
    if adapter.init == "loftq" and quantization is None:
        message = 'init = "loftq" makes up for what packing loses, and nothing is packed'
        yield Finding(code="QT022", path=("adapter", "init"), message=message, hint="add [quantization]")


def _adapter(adapter: AdapterConfig) -> Iterable[Finding]:
    if adapter.loftq_iterations != 1 and adapter.init != "loftq":
        message = f'loftq_iterations has no meaning for init = "{adapter.init}"'
        yield Finding(code="QT021", path=("adapter", "loftq_iterations"), message=message)


_REGEX = re.compile(r"[\\^$*+?{}\[\]()|]")


def _targets(adapter: AdapterConfig) -> Iterable[Finding]:
    """A text of targets that is no regular expression, or is one by mistake."""
    text, path = adapter.targets, ("adapter", "targets")
    if not isinstance(text, str) or text == ALL_LINEAR:
        return
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        message = f"expected a regular expression, found {quoted(text)}: {error}"
        hint = 'or name layers in a list, e.g. ["q_proj", "v_proj"]'
        yield Finding(code="QT014", path=path, message=message, hint=hint)
        return
    if not _REGEX.search(text) and SequenceMatcher(None, text.lower(), ALL_LINEAR).ratio() >= 0.8:
        message = f"expected {quoted(ALL_LINEAR)}, names in a list or a regular expression, found {quoted(text)}"
        yield Finding(code="QT014", path=path, message=message, hint=f"did you mean {quoted(ALL_LINEAR)}?")


def _periods(evaluation: EvaluationConfig, checkpoint: CheckpointConfig) -> Iterable[Finding]:
    for section, config in (("evaluation", evaluation), ("checkpoint", checkpoint)):
        if config.every_steps is not None and config.per_epoch is not None:
            message = "per_epoch and every_steps both say how often"
            yield one_of((section, "per_epoch"), (section, "every_steps"), message)


GPU_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention that train on a GPU only."""


def _on_a_cpu(training: TrainingConfig, model: ModelConfig) -> Iterable[Finding]:
    if training.device != "cpu":
        return
    gpu_only: tuple[tuple[tuple[str, str], bool, str], ...] = (
        (("training", "optimizer"), training.optimizer.startswith("paged"), f'optimizer = "{training.optimizer}"'),
        (("training", "tf32"), training.tf32, "tf32 = true"),
        (
            ("training", "activation_checkpointing"),
            training.activation_checkpointing == "offload",
            'activation_checkpointing = "offload"',
        ),
        (
            ("model", "attn_implementation"),
            model.attn_implementation in GPU_ATTENTION,
            f'attn_implementation = "{model.attn_implementation}"',
        ),
    )
    for path, chosen, text in gpu_only:
        if chosen:
            message = f'{text} is for a GPU, and [training] device = "cpu" trains on none'
            hint, other = "remove one of them", ("training", "device")
            yield Finding(code="QT021", path=path, message=message, hint=hint, other=other)


FIXED_CONFIG = {
    "architectures": "the checkpoint decides it",
    "auto_map": "the checkpoint decides it",
    "model_type": "the checkpoint decides it",
    "quantization_config": "say how the base is stored in [quantization]",
    "vocab_size": "grow it with [model] added_tokens or pad_vocabulary_to_multiple_of",
    "bos_token_id": "name the token in [model.special_tokens]",
    "eos_token_id": "name the token in [model.special_tokens]",
    "pad_token_id": "name the token in [model.special_tokens]",
    "attn_implementation": "choose it with [model] attn_implementation",
    "_attn_implementation": "choose it with [model] attn_implementation",
    "dtype": "choose it with [training] precision",
    "torch_dtype": "choose it with [training] precision",
}
"""Values of a `config.json` that a recipe can't replace, and what to do instead."""


def _model_config(model: ModelConfig) -> Iterable[Finding]:
    tables: list[tuple[tuple[str, ...], dict[str, Any]]] = [(("model", "config"), model.config)]
    for path, table in tables:
        for key, value in table.items():
            if key in FIXED_CONFIG:
                message = f"{key} of the base's config.json can't be replaced"
                yield Finding(code="QT180", path=(*path, key), message=message, hint=FIXED_CONFIG[key])
            elif isinstance(value, dict):
                tables.append(((*path, key), value))


def _adapter_parts(adapter: AdapterConfig) -> Iterable[Finding]:
    """What PEFT's adapters on weights of experts can't be, and what is said twice."""
    if adapter.target_parameters:
        if adapter.use_dora:
            yield Finding(
                code="QT020",
                path=("adapter", "use_dora"),
                message="use_dora trains the magnitudes of linear layers' rows, which target_parameters don't have",
                hint="leave out one of them",
                other=("adapter", "target_parameters"),
            )
        if adapter.init not in ("default", "gaussian"):
            yield Finding(
                code="QT020",
                path=("adapter", "init"),
                message=f'init = "{adapter.init}" begins with a share of linear layers\' weights, which '
                "target_parameters can't",
                hint='use init = "default" or leave target_parameters out',
                other=("adapter", "target_parameters"),
            )
    if adapter.start_from is not None and adapter.init != "default":
        message = f'init = "{adapter.init}" and start_from both say how the adapter begins'
        yield one_of(("adapter", "init"), ("adapter", "start_from"), message)
    if adapter.targets == () and not adapter.target_parameters:
        yield Finding(
            code="QT022",
            path=("adapter", "targets"),
            message="an empty list of targets covers nothing",
            hint='use "all-linear", name layers, or name weights of experts in target_parameters',
        )
    listed = () if isinstance(adapter.targets, str) else adapter.targets
    for name in adapter.modules_to_save:
        if name in listed:
            yield Finding(
                code="QT020",
                path=("adapter", "modules_to_save"),
                message=f'"{name}" is trained in full by modules_to_save and adapted by targets',
                hint="name it in one of them",
                other=("adapter", "targets"),
            )


def _dropout(adapter: AdapterConfig) -> Iterable[Finding]:
    if adapter.target_parameters and adapter.dropout > 0:
        yield Finding(
            code="QT121",
            path=("adapter", "dropout"),
            message=f"dropout = {adapter.dropout} drops inputs of the adapter, and an adapter on target_parameters has "
            "none of its own: it is added to the weights",
            hint="use dropout = 0.0, or leave target_parameters out",
            other=("adapter", "target_parameters"),
        )


def _tokens(model: ModelConfig) -> Iterable[Finding]:
    seen: set[str] = set()
    special = model.special_tokens.additional_special_tokens
    for key, tokens in (("added_tokens", model.added_tokens), ("special_tokens", special)):
        path = ("model", key) if key == "added_tokens" else ("model", key, "additional_special_tokens")
        twice = next((token for index, token in enumerate(tokens) if token in (*seen, *tokens[:index])), None)
        if twice is not None:
            message = f"{json.dumps(twice)} is added to the vocabulary twice"
            yield Finding(code="QT020", path=path, message=message, hint="name it once")
        seen.update(tokens)


def _constant(training: TrainingConfig) -> Iterable[Finding]:
    if training.schedule == "constant" and training.min_lr_ratio > 0:
        message = 'min_lr_ratio has no meaning for schedule = "constant", which ends at the peak'
        hint = 'remove it, or use schedule = "cosine" or "linear"'
        yield Finding(code="QT021", path=("training", "min_lr_ratio"), message=message, hint=hint)


def _never_evaluated(evaluation: EvaluationConfig, data: DataConfig, training: TrainingConfig) -> Iterable[Finding]:
    """What is known without reading the data; the rest is known when the run's length is.

    Samples that `eval_size` holds out are at least not trained on, evaluated or not.
    """
    if not data.eval or evaluation.at_start or evaluation.at_end:
        return
    every, steps = evaluation.every_steps, training.max_steps
    if evaluation.per_epoch is None and (every is None or (steps is not None and every > steps)):
        when = "at_start, every_steps or per_epoch" if every is None else f"every_steps = {every} within {steps} steps"
        yield Finding(
            code="QT022",
            path=("evaluation", "at_end"),
            message=f"there is [[data.eval]], and nothing evaluates it: no {when}, and at_end = false",
            hint="set one of them, or remove [[data.eval]]",
        )


def _precision(training: TrainingConfig, model: ModelConfig) -> Iterable[Finding]:
    attention = model.attn_implementation
    if training.precision == "fp32" and attention.startswith("flash_attention"):
        yield Finding(
            code="QT020",
            path=("model", "attn_implementation"),
            message=f'attn_implementation = "{attention}" computes in bf16, and [training] precision is "fp32"',
            hint='use "sdpa", or precision = "bf16"',
            other=("training", "precision"),
        )


def _evaluation_details(evaluation: EvaluationConfig, data: DataConfig) -> Iterable[Finding]:
    defaults = EvaluationConfig()
    if not data.eval and data.eval_size is None:
        for key in ("batch_size", "max_samples"):
            if getattr(evaluation, key) != getattr(defaults, key):
                message = f"{key} says how to evaluate, and there is nothing to evaluate on"
                yield Finding(code="QT022", path=("evaluation", key), message=message, hint="add [[data.eval]]")


_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterable[Finding]]], ...] = (
    (("training",), _training),
    (("evaluation", "data"), _evaluation),
    (("data",), check_sources),
    (("data",), check_data),
    (("model",), _model),
    (("adapter",), _adapter),
    (("adapter",), _targets),
    (("adapter",), _adapter_parts),
    (("adapter", "quantization"), _loftq),
    (("adapter", "training", "quantization"), check_full),
    (("training", "adapter", "quantization"), check_qat),
    (("evaluation", "checkpoint"), _periods),
    (("training", "model"), _on_a_cpu),
    (("model",), _model_config),
    (("model",), _tokens),
    (("adapter",), _dropout),
    (("training",), _constant),
    (("evaluation", "data", "training"), _never_evaluated),
    (("training", "model"), _precision),
    (("evaluation", "data"), _evaluation_details),
)
