"""A first recipe for a model, a backend and a task, and a few rows of data to try it with.

The comments are the documentation of the keys, from the same docstrings as the reference.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import tomlkit

from quantune.errors import DataError, InputError, ModelError
from quantune.outputs import write_output
from quantune.recipe.preflight import base_problem, is_local
from quantune.recipe.reference import field_docs_if_any, literal_values
from quantune.recipe.schema import (
    ALL_LINEAR,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    Format,
    LoggingConfig,
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    SourceConfig,
    TrainingConfig,
)
from quantune.recipe.source_conflicts import FILE_TYPES, KEYS_OF

WIDTH = 100
_OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("open", "closed"), ("full", "empty")),
    *(("light", "dark"), ("early", "late"), ("long", "short"), ("hard", "soft"), ("wet", "dry"), ("near", "far")),
    *(("old", "new"), ("loud", "quiet"), ("thick", "thin"), ("deep", "shallow"), ("right", "wrong"), ("up", "down")),
    *(("wide", "narrow"), ("rich", "poor")),
)


@attrs.frozen(kw_only=True)
class Choice:
    """What a first recipe is for."""

    base: str
    """As it stands in the recipe."""
    backend: str
    """The backend's name."""
    options: type
    """The backend's options class."""
    weight_dtype: str | None
    """None for a backend of one format."""
    task: Format
    """What the rows of the data are."""
    data: str
    """The data file, as it stands in the recipe."""
    schema: str | None = None
    """The JSON Schema that editors read beside the recipe."""


def recipe_text(choice: Choice, name: str) -> str:
    """The recipe as TOML, every key with its meaning; `name` is that of its file.

    A line that begins with `#key` is one that can be had by taking the `#` away.
    """
    dtype = "" if choice.weight_dtype is None else f" in {choice.weight_dtype}"
    head = [f"#:schema {choice.schema}"] if choice.schema else []
    head += _comment(
        f"Trains a LoRA adapter on {choice.base}, its weights packed by the backend {choice.backend}{dtype}."
    )
    head += ["#", f"#   quantune check {name}", f"#   quantune run {name}"]
    weights: dict[str, Any] = {} if choice.weight_dtype is None else {"weight_dtype": choice.weight_dtype}
    columns = {key: None for key in _columns(choice.task)}
    quantization = _table("[quantization]", QuantizationConfig, {"backend": choice.backend})
    tables = (
        _table("[model]", ModelConfig, {"base": choice.base}),
        [*quantization, *_keys(choice.options, weights)],
        _table("[adapter]", AdapterConfig, {"r": 16, "alpha": 32, "targets": ALL_LINEAR, "dropout": None}),
        _table("[data]", DataConfig, {"max_length": 1024, "packing": None, "eval_size": Example(0.1)}),
        _table("[[data.train]]", SourceConfig, {"path": choice.data, "format": choice.task, **columns}),
        _table(
            "[training]",
            TrainingConfig,
            {"epochs": 3, "batch_size": 8, "learning_rate": 2e-4, "activation_checkpointing": None, "seed": None},
        ),
        _table("[checkpoint]", CheckpointConfig, {"every_steps": Example(100)}),
        _table("[logging]", LoggingConfig, {"every_steps": 5}),
        _table("[output]", OutputConfig, {"dir": None}),
    )
    return "\n\n".join("\n".join(lines) for lines in (head, *tables)) + "\n"


def sample_rows(task: Format) -> str:
    """Twenty rows for a task, as JSON lines: words and their opposites."""
    return "".join(json.dumps(_row(task, word, opposite)) + "\n" for word, opposite in _OPPOSITES)


def base_in(recipe: Path, base: str) -> str:
    """A base given on the command line as the recipe in the file `recipe` names it.

    Raises:
        ModelError: there is no such built-in model, or the folder does not hold a model.
    """
    folder = Path(base).expanduser()
    local = not base.startswith("builtin:") and (is_local(base) or folder.is_dir())
    problem = base_problem(str(folder.resolve()) if local else base)
    if problem:
        raise ModelError("; ".join(part for part in problem if part))
    return path_in(recipe, folder) if local else base


def data_in(recipe: Path, data: Path) -> str:
    """A data file given on the command line as the recipe in the file `recipe` names it.

    Raises:
        DataError: it is not there, or none that can be read.
    """
    if data.suffix.lower() not in FILE_TYPES:
        raise DataError(f"expected a data file ending in {', '.join(FILE_TYPES)}, found {data}")
    if not data.expanduser().is_file():
        raise DataError(f"there is no file {data}")
    return path_in(recipe, data.expanduser())


def path_in(recipe: Path, path: Path) -> str:
    """A path relative to the current folder as the recipe in the file `recipe` names it; an absolute one as it is."""
    if path.is_absolute():
        return str(path)
    beside = Path(os.path.relpath(path, recipe.parent)).as_posix()
    return beside if beside.startswith(".") else f"./{beside}"


def sample_of(task: Format) -> str:
    """The file of a task's sample, as it stands in the recipe."""
    return f"data/{task}.jsonl"


def sample_beside(recipe: Path, task: Format) -> tuple[Path, dict[Path, str]]:
    """Where the sample of the recipe in the file `recipe` is, and what to write there: nothing over rows it finds."""
    path = recipe.parent / sample_of(task)
    return path, {} if path.exists() else {path: sample_rows(task)}


def schema_beside(recipe: Path) -> Path:
    """The file of the JSON Schema that the recipe in the file `recipe` begins with."""
    return recipe.parent / f"{recipe.stem}.schema.json"


def write_new(files: Mapping[Path, str], *, force: bool) -> None:
    """Write text files and the folders they are in; those that are there already only with `force`.

    Raises:
        InputError: a file is there already, or what is there is a folder; then none is written.
    """
    for path in files:
        if path.is_dir():
            raise InputError(f"expected a file to write, found the folder {path}")
    there = [str(path) for path in files if path.exists()]
    if there and not force:
        raise InputError(
            f"{' and '.join(there)} already exist{'s' * (len(there) == 1)}; --force replaces what is there"
        )
    for path, text in files.items():
        write_output(path, text, parents=True)


@attrs.frozen
class Example:
    """A value to show for a key that is unset by default."""

    value: Any


def _table(header: str, cls: type, keys: Mapping[str, Any]) -> list[str]:
    return [header, *_keys(cls, keys)]


def _keys(cls: type, keys: Mapping[str, Any]) -> Iterable[str]:
    """Each key with its documentation above and its other values behind; None and an example are commented out."""
    docs, fields = field_docs_if_any(cls), attrs.fields_dict(cls)
    for key, value in keys.items():
        yield from _comment(docs.get(key, ""))
        commented = value is None or isinstance(value, Example)
        shown = fields[key].default if value is None else value.value if isinstance(value, Example) else value
        others = [_toml(other) for other in literal_values(cls, key) if other != shown]
        line = f"{'#' * commented}{key} = {_toml(shown)}"
        yield f"{line}  # or {', '.join(others)}" if others else line


def _comment(text: str) -> list[str]:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return [f"# {line}" for line in textwrap.wrap(printable, WIDTH - 2, break_on_hyphens=False)]


def _toml(value: Any) -> str:
    return tomlkit.item(value).as_string()


def _columns(task: Format) -> list[str]:
    """The keys of a source that name the columns which every row of the task has."""
    unset = SourceConfig(format=task)
    return [key for key in KEYS_OF.get(task, ()) if key.endswith("_column") and getattr(unset, key) is not None]


def _row(task: Format, word: str, opposite: str) -> dict[str, Any]:
    question = f"What is the opposite of {word}?"
    if task == "chat":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": opposite}]}
    if task == "instruct":
        return {"prompt": question, "response": opposite}
    if task == "alpaca":
        return {"instruction": "Give the opposite of the word.", "input": word, "output": opposite}
    return {"text": f"The opposite of {word} is {opposite}."}
