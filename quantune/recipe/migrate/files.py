"""YAML files into recipe files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from quantune.errors import InputError
from quantune.recipe.load import OptionsOf
from quantune.recipe.migrate.migrate import Migration, migrate, unreadable
from quantune.recipe.migrate.reading import LARGEST, Unreadable

SUFFIXES = (".yaml", ".yml")


@attrs.frozen(kw_only=True)
class Migrated:
    """A file with what came of it."""

    path: Path
    """The YAML."""
    migration: Migration
    """The recipe and the report."""
    written: Path | None = None
    """The recipe's file, where one was written."""
    problem: str | None = None
    """Why none was, apart from what the report says."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        written = None if self.written is None else str(self.written)
        return {**self.migration.report.as_dict(), "written": written, "not_written": self.problem}


def yaml_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named.

    Raises:
        InputError: one of them does not exist, or a folder holds no YAML.
    """
    found: list[Path] = []
    for path in paths:
        try:
            found += _files_at(path)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise InputError(f"{path} can't be read: {error.strerror}") from None
    return list(dict.fromkeys(found))


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not inside:
            raise InputError(f"expected YAML files in {path}, found none that ends in {' or '.join(SUFFIXES)}")
        return inside
    if not path.exists():
        raise InputError(f"there is no file {path}")
    return [path]


def migrate_files(
    files: Sequence[Path],
    *,
    options_of: OptionsOf,
    output: Path | None = None,
    report: Path | None = None,
    write: bool = True,
    force: bool = False,
    overwrite: bool = False,
    processes: int = 1,
) -> list[Migrated]:
    """Translate each file, and write its recipe where it can be written.

    Args:
        files: the YAMLs.
        options_of: the attrs class of a backend's options.
        output: the recipe of the only file; by default each stands beside its YAML.
        report: where the caller will write a report; it must be none of the YAMLs, nor a recipe.
        write: write recipes at all.
        force: write those as well that lack something, with a list of it at the head.
        overwrite: replace recipes that are there.
        processes: in how many processes the YAMLs were run.

    Raises:
        InputError: one output for several files, two things to be written to one place, or over a YAML.
    """
    if output is not None and len(files) != 1:
        raise InputError(f"--output names the recipe of one file, found {len(files)} files")
    if output is not None and os.path.isdir(output):
        raise InputError(f"expected a file to write for --output, found the folder {output}")
    targets = [output or file.with_suffix(".toml") for file in files]
    _refuse_shared_places(files, targets if write else (), report)
    return [
        _migrate_file(file, target, write, force, overwrite, processes, options_of)
        for file, target in zip(files, targets, strict=True)
    ]


def _refuse_shared_places(files: Sequence[Path], targets: Sequence[Path], report: Path | None) -> None:
    """Raise where something would be written over a YAML, or over something else that is written."""
    taken = {file.resolve(): f"the YAML {file}" for file in files}
    outputs = [(target, f"the recipe of {file}") for file, target in zip(files, targets, strict=False)]
    for place, what in [*outputs, *([(report, "the report")] if report is not None else [])]:
        if place.resolve() in taken:
            other = taken[place.resolve()]
            raise InputError(f"{place} can't be both {other} and {what}; --output and --report name other files")
        taken[place.resolve()] = what


def _migrate_file(
    file: Path, target: Path, write: bool, force: bool, overwrite: bool, processes: int, options_of: OptionsOf
) -> Migrated:
    folder = target.parent.resolve()
    beside = None if folder == Path.cwd() else folder
    try:
        migration = migrate(_read(file), str(file), processes, options_of=options_of, folder=beside)
    except Unreadable as error:
        migration = unreadable(str(file), error.message)
    if not write or migration.recipe is None or not (migration.report.ok or force):
        return Migrated(path=file, migration=migration)
    if os.path.lexists(target) and not overwrite:
        problem = f"{target} is there already; --overwrite replaces it, --output names another"
        return Migrated(path=file, migration=migration, problem=problem)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(migration.recipe, encoding="utf-8", newline="\n")
        os.replace(partial, target)
    except OSError as error:
        problem = f"{target} can't be written: {error.strerror}"
        with suppress(OSError):
            partial.unlink()
        return Migrated(path=file, migration=migration, problem=problem)
    return Migrated(path=file, migration=migration, written=target)


def _read(file: Path) -> str:
    try:
        if not file.is_file():
            raise Unreadable("expected a file, found a pipe or a device")
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise Unreadable(f"expected at most {LARGEST >> 20} MiB of text, found {file.stat().st_size:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"expected UTF-8 text, found other bytes at position {error.start}") from None
    except OSError as error:
        raise Unreadable(f"the file can't be read: {error.strerror}") from None
