"""What several values of a recipe say together: pure functions from a recipe to findings."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import PurePath

import attrs

from quantune.recipe.schema import Recipe, SourceConfig
from quantune.recipe.structure import Finding

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
COLUMNS_OF = {
    "chat": ("messages_column",),
    "instruct": ("prompt_column", "response_column", "template"),
    "completion": ("text_column",),
}


def check(recipe: Recipe) -> list[Finding]:
    """Every contradiction in the recipe, whatever the order of its keys."""
    return [*_training(recipe), *_evaluation(recipe), *_sources(recipe), *_model(recipe)]


def _training(recipe: Recipe) -> Iterable[Finding]:
    training = recipe.training
    if training.max_steps is not None and training.epochs is not None:
        message = "epochs and max_steps both set the length of the run"
        yield Finding(code="QT020", path=("training", "epochs"), message=message, hint="remove one of them")
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        message = "warmup_ratio and warmup_steps both set the warm-up"
        yield Finding(code="QT020", path=("training", "warmup_ratio"), message=message, hint="remove one of them")
    if training.warmup_steps and training.max_steps and training.warmup_steps >= training.max_steps:
        yield Finding(
            code="QT020",
            path=("training", "warmup_steps"),
            message=f"a warm-up of {training.warmup_steps} steps does not end within max_steps = {training.max_steps}",
        )
    if isinstance(training.micro_batch_size, int) and training.batch_size % training.micro_batch_size:
        divisors = [n for n in range(1, training.batch_size + 1) if training.batch_size % n == 0]
        yield Finding(
            code="QT020",
            path=("training", "micro_batch_size"),
            message=f"micro_batch_size = {training.micro_batch_size} does not divide batch_size = "
            f"{training.batch_size}",
            hint=f"one of {', '.join(map(str, divisors))} does",
        )


def _evaluation(recipe: Recipe) -> Iterable[Finding]:
    evaluation = recipe.evaluation
    if not recipe.data.eval:
        for key in ("at_start", "every_steps", "exact_match"):
            if getattr(evaluation, key):
                message = f"{key} asks for an evaluation, and there is nothing to evaluate on"
                yield Finding(code="QT022", path=("evaluation", key), message=message, hint="add [[data.eval]]")
    elif evaluation.exact_match and all(source.format == "completion" for source in recipe.data.eval):
        yield Finding(
            code="QT022",
            path=("evaluation", "exact_match"),
            message="exact_match compares answers to prompts, and completion data has neither",
            hint='use format = "chat" or "instruct" in [[data.eval]]',
        )


def _sources(recipe: Recipe) -> Iterable[Finding]:
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, part)):
            for key, code, message, hint in _source(source):
                yield Finding(code=code, path=("data", part, index, key), message=message, hint=hint)


def _source(source: SourceConfig) -> Iterable[tuple[str, str, str, str | None]]:
    defaults = {field.name: field.default for field in attrs.fields(SourceConfig)}
    if source.path is None and source.dataset is None:
        yield "path", "QT022", "a source needs a path (a file) or a dataset (of the hub)", None
    if source.path is not None and source.dataset is not None:
        yield "dataset", "QT020", "path and dataset both say where the rows come from", "remove one of them"
    if source.path is not None and source.dataset is None:
        for key in ("name", "split", "revision"):
            if getattr(source, key) != defaults[key]:
                yield key, "QT021", f"{key} belongs to a dataset of the hub and has no meaning beside path", None
        if PurePath(source.path).suffix.lower() not in FILE_TYPES:
            yield "path", "QT014", f"expected a file ending in {', '.join(FILE_TYPES)}, found {source.path!r}", None
    for format_, keys in COLUMNS_OF.items():
        for key in keys:
            if format_ != source.format and getattr(source, key) != defaults[key]:
                yield key, "QT021", f'{key} has no meaning for format = "{source.format}"', None
    if source.template is not None and source.format == "instruct":
        problem = _template_problem(source.template)
        if problem:
            yield "template", "QT014", problem, 'write columns in braces, e.g. "Q: {prompt}\\nA: "'


def _template_problem(template: str) -> str | None:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"is no template: {error}"
    if not columns or not all(column.isidentifier() for column in columns):
        return "expected at least one column in braces, and nothing else in braces"
    return None


def _model(recipe: Recipe) -> Iterable[Finding]:
    if recipe.model.base.startswith("builtin:"):
        for key in ("trust_remote_code", "revision"):
            if getattr(recipe.model, key):
                message = f"{key} has no meaning for a built-in model"
                yield Finding(code="QT021", path=("model", key), message=message)
