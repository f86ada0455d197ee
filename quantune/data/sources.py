"""Reading rows, each with the place it came from."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig


@attrs.frozen(kw_only=True)
class Row:
    """One row of a source."""

    values: dict[str, Any]
    where: str
    """E.g. `train.jsonl:12`."""


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """The rows of a source, in its order, up to `source.limit`.

    Raises:
        DataError: the source can't be read, or a row is broken; the message names file and line.
    """
    return itertools.islice(_rows(source), source.limit)


def describe(source: SourceConfig) -> str:
    """The source's name in messages."""
    return Path(source.path).name if source.path else str(source.dataset)


def _rows(source: SourceConfig) -> Iterator[Row]:
    if source.path is None:
        return _hub(source)
    path = Path(source.path)
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file ending in .jsonl, .json, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    return reader(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            text = _decode(line, where).strip()
            if text:
                yield Row(values=_object(text, where, path), where=where)


def _object(text: str, where: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected one JSON object on the line, {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {_kind(value)}")
    return value


def _json(path: Path) -> Iterator[Row]:
    text = _decode(path.read_bytes(), path.name)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path.name}:{error.lineno}: not valid JSON, {error.msg}{hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a list of objects, found {_kind(rows)}")
    for index, row in enumerate(rows):
        where = f"{path.name}[{index}]"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {_kind(row)}")
        yield Row(values=row, where=where)


def _csv(path: Path) -> Iterator[Row]:
    lines = _decode(path.read_bytes(), path.name).splitlines(keepends=True)
    reader = csv.DictReader(lines, strict=True, restkey="", restval=None)
    try:
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if "" in row or None in row.values():
                found = len([value for value in row.values() if value is not None])
                raise DataError(f"{where}: expected {len(reader.fieldnames or ())} columns, found {found}")
            yield Row(values=dict(row), where=where)
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.line_num}: not valid CSV, {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    return _from_datasets(path.name, "parquet", data_files=str(path), split="train")


def _hub(source: SourceConfig) -> Iterator[Row]:
    assert source.dataset is not None
    return _from_datasets(
        source.dataset, source.dataset, name=source.name, split=source.split, revision=source.revision
    )


def _from_datasets(label: str, *args: Any, **kwargs: Any) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{label}: reading it needs the datasets package; pip install 'quantune[datasets]'") from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{label}: can't be read, {str(error).splitlines()[0]}") from error
    for index, values in enumerate(loaded):
        yield Row(values=values, where=f"{label}[{index}]")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        place = f"{where}:{line + 1}" if ":" not in where else where
        raise DataError(f"{place}: expected UTF-8 text, found the byte 0x{data[error.start]:02x}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
