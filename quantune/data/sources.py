"""Reading rows, each with the place it came from."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from quantune.errors import DataError
from quantune.recipe.schema import SourceConfig
from quantune.recipe.slices import Split, parse_split


@attrs.frozen(kw_only=True)
class Row:
    """One row of a source."""

    values: dict[str, Any]
    """The row's columns."""
    where: str
    """File and line, `train.jsonl:12`, or dataset and index from 0, `train.parquet[12]`."""


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """The rows of a source's split, in its order, up to `source.limit`; what comes after the limit is not looked at,
    unless the split is a share of all rows.

    Raises:
        DataError: the source can't be read, has no rows, or a row is broken; the message names file and line.
    """
    empty = True
    for row in itertools.islice(_rows(source), source.limit):
        empty = False
        yield row
    if empty:
        where = "" if source.split == "train" else f' in split = "{source.split}"'
        raise DataError(f"{describe(source)}: expected at least one row{where}, found none")


def describe(source: SourceConfig) -> str:
    """The source's name in messages."""
    return Path(source.path).name if source.path else str(source.dataset)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _rows(source: SourceConfig) -> Iterator[Row]:
    if source.path is None:
        return _hub(source)
    path = Path(source.path)
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file ending in .jsonl, .json, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    return _sliced(reader(path), _split_of_file(source.split, path))


def _split_of_file(text: str, path: Path) -> Split:
    try:
        split = parse_split(text)
    except ValueError as error:
        raise DataError(f"{path.name}: {error}") from None
    if split.name != "train":
        raise DataError(f'{path.name}: expected split = "train" or a slice of it, found {text!r}')
    return split


def _sliced(rows: Iterator[Row], split: Split) -> Iterator[Row]:
    if split.whole:
        return rows
    if not split.needs_count:
        begin = split.begin or 0
        return itertools.islice(rows, begin, None if split.end is None else max(begin, split.end))
    read = list(rows)
    begin, end = split.bounds(len(read))
    return iter(read[begin:end])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line, line ends kept."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path.name}:{number}"
                yield where, _decode(line, where)
    except OSError as error:
        raise DataError(f"{path}: can't be read, {error.strerror}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, found the byte 0x{line[error.start]:02x}") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        text = line.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: expected one JSON object on the line, {error.msg} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
            raise DataError(f"{where}: expected one JSON object on the line, {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {kind(value)}")
        yield Row(values=value, where=where)


def _json(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path.name}:{error.lineno}: not valid JSON, {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: not valid JSON, {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a list of objects, found {kind(rows)}")
    for index, row in enumerate(rows):
        where = f"{path.name}[{index}]"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {kind(row)}")
        yield Row(values=row, where=where)


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    columns: list[str] = []
    while True:
        start = reader.line_num + 1
        fields = _csv_fields(reader, path)
        if fields is None:
            return
        if not fields:
            continue  # a blank line
        where = f"{path.name}:{start}"
        if not columns:
            columns = fields
            if len(set(columns)) != len(columns):
                twice = next(name for name in columns if columns.count(name) > 1)
                raise DataError(f'{where}: expected a name of its own for every column, found "{twice}" twice')
        elif len(fields) != len(columns):
            raise DataError(f"{where}: expected {len(columns)} columns, found {len(fields)}")
        else:
            yield Row(values=dict(zip(columns, fields, strict=True)), where=where)


def _csv_fields(reader: Any, path: Path) -> list[str] | None:
    """The next record of a `csv.reader`, None at the end."""
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts of 128 KiB
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.line_num}: not valid CSV, {error}") from None
    finally:
        csv.field_size_limit(previous)


def _parquet(path: Path) -> Iterator[Row]:
    return _from_datasets(path.name, "parquet", data_files=str(path), split="train")


def _hub(source: SourceConfig) -> Iterator[Row]:
    if source.dataset is None:
        raise DataError("a source needs a path or a dataset, found neither")
    return _from_datasets(
        source.dataset,
        source.dataset,
        name=source.name,
        data_files=list(source.data_files) or None,
        split=source.split,
        revision=source.revision,
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
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(f"{label}: can't be read, {reason}") from error
    for index, values in enumerate(loaded):
        yield Row(values=values, where=f"{label}[{index}]")
