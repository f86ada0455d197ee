"""What the keys of `[data]` and of its sources say together."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import PurePath

from quantune.recipe.positions import Path
from quantune.recipe.schema import ROLES, DataConfig, SourceConfig
from quantune.recipe.slices import parse_split, parse_sum
from quantune.recipe.structure import Finding

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
KEYS_OF = {
    "chat": ("messages_column", "message_keys", "roles", "drop_system_message", "train_on_eos"),
    "instruct": ("prompt_column", "response_column", "template", "input_column", "template_no_input"),
    "completion": ("text_column",),
}
"""The keys of a source that belong to one format alone."""


SourceFinding = tuple[str, str, str, str | None]
"""Key, code, message and hint."""


def check_sources(data: DataConfig) -> Iterable[Finding]:
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(data, part)):
            at = ("data", part, index)
            if source.path is not None and source.dataset is not None:
                message = "path and dataset both say where the rows come from"
                yield one_of((*at, "dataset"), (*at, "path"), message)
            for key, code, message, hint in _source(source):
                yield Finding(code=code, path=(*at, key), message=message, hint=hint)


def _source(source: SourceConfig) -> Iterable[SourceFinding]:
    unset = SourceConfig(format=source.format)
    if source.path is None and source.dataset is None:
        yield "path", "QT022", "a source needs a path (a file) or a dataset (of the hub)", None
    if source.path is not None and source.dataset is None:
        for key in ("name", "revision", "data_files"):
            if getattr(source, key) != getattr(unset, key):
                yield key, "QT021", f"{key} belongs to a dataset of the hub and has no meaning beside path", None
        if PurePath(source.path).suffix.lower() not in FILE_TYPES:
            yield "path", "QT014", f"expected a file ending in {', '.join(FILE_TYPES)}, found {source.path!r}", None
        yield from _split_of_file(source.split)
    else:
        yield from _split_of_dataset(source.split)
    for format_, keys in KEYS_OF.items():
        for key in keys:
            if format_ != source.format and getattr(source, key) != getattr(unset, key):
                yield key, "QT021", f'{key} has no meaning for format = "{source.format}"', None
    if source.format == "instruct":
        yield from _instruct(source)
    if source.format == "chat":
        yield from _chat(source)
    yield from _loss_on(source)


def _split_of_file(text: str) -> Iterable[SourceFinding]:
    try:
        name = parse_split(text).name
    except ValueError as error:
        yield "split", "QT014", str(error), "of a file it is train, or a slice of it, e.g. train[:20%]"
        return
    if name != "train":
        message = f'a file has one split, which is called train; split = "{text}" belongs to a dataset of the hub'
        yield "split", "QT021", message, "use train, or a slice of it, e.g. train[:20%]"


def _split_of_dataset(text: str) -> Iterable[SourceFinding]:
    try:
        parse_sum(text)
    except ValueError as error:
        yield "split", "QT014", str(error), "or a sum of such splits, e.g. train[:20%]+test"


def _instruct(source: SourceConfig) -> Iterable[SourceFinding]:
    for key in ("template", "template_no_input"):
        problem = None if getattr(source, key) is None else _template_problem(getattr(source, key))
        if problem:
            yield key, "QT014", problem, 'write columns in braces, e.g. "Q: {prompt}\\nA: "'
    if source.template is not None and source.prompt_column != "prompt":
        message = "prompt_column has no meaning beside template, which names its columns itself"
        yield "prompt_column", "QT021", message, f"write {{{source.prompt_column}}} in template, or leave template out"
    pairs = [("input_column", "template_no_input"), ("template_no_input", "input_column")]
    for key, other in [*pairs, ("input_column", "template")]:
        if getattr(source, key) is not None and getattr(source, other) is None:
            yield key, "QT022", f"{key} says which of two templates a row takes, and there is no {other}", None


def _chat(source: SourceConfig) -> Iterable[SourceFinding]:
    for role in source.roles:
        if role not in ROLES:
            message = f'expected the roles {", ".join(ROLES)}, found "{role}"'
            yield "roles", "QT014", message, 'write the data\'s names behind them, e.g. {assistant = ["gpt"]}'
    names = [(name, role) for role, names in source.roles.items() for name in names]
    for name, role in names:
        others = [other for another, other in names if another == name and other != role]
        if name in ROLES and name != role:
            others.append(name)
        if others:
            yield "roles", "QT020", f'"{name}" is the name of two roles, {role} and {others[0]}', None
            break
    keys = list({"role": "role", "content": "content", **source.message_keys}.values())
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        yield "message_keys", "QT020", f'two keys of a message are read from "{twice}"', None
    if source.drop_system_message and not isinstance(source.loss_on, str) and "system" in source.loss_on:
        message = "loss_on trains on what the system message says, and drop_system_message leaves it out"
        yield "loss_on", "QT020", message, "remove one of them"
    if source.loss_on == "all" and source.train_on_eos != "turn":
        message = 'train_on_eos has no meaning beside loss_on = "all", which trains on every token'
        yield "train_on_eos", "QT021", message, f"list roles: loss_on = {json.dumps(ROLES)}"


def _loss_on(source: SourceConfig) -> Iterable[SourceFinding]:
    if isinstance(source.loss_on, str):
        return
    known = ROLES if source.format == "chat" else ("user", "assistant")
    if source.format == "completion":
        yield "loss_on", "QT021", "completion has no roles and trains on everything", "leave loss_on out"
    elif not source.loss_on:
        yield "loss_on", "QT014", "expected at least one role, found an empty list", None
    for role in source.loss_on:
        if source.format != "completion" and role not in known:
            message = f'expected roles among {", ".join(known)}, found "{role}"'
            yield "loss_on", "QT014", message, 'or loss_on = "all"' if role == "all" else None


def check_data(data: DataConfig) -> Iterable[Finding]:
    if data.eval_size is not None and data.eval:
        message = "eval_size and [[data.eval]] both say what is evaluated on"
        yield one_of(("data", "eval_size"), ("data", "eval"), message)
    if data.overlong == "split" and not any(source.format == "completion" for source in (*data.train, *data.eval)):
        message = 'overlong = "split" splits completion text, and no source has any'
        hint = 'use "drop", which is what happens to other samples that are too long'
        yield Finding(code="QT021", path=("data", "overlong"), message=message, hint=hint)


def _template_problem(template: str) -> str | None:
    try:
        fields = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        return f"is no template: {error}"
    if not fields or not all((column or "").isidentifier() for _, column, _, _ in fields):
        return "expected at least one column in braces, and nothing else in braces"
    for _, column, spec, conversion in fields:
        if conversion not in (None, "r", "s", "a") or "{" in (spec or ""):
            return f'the column "{column}" is formatted in a way that does not exist'
    return None


def one_of(path: Path, other: Path, message: str) -> Finding:
    """Two keys that say the same."""
    return Finding(code="QT020", path=path, message=message, hint="remove one of them", other=other)
