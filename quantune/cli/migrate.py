"""`quantune migrate`: recipes from the YAML of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from quantune.backends import registry
from quantune.cli.console import err, out
from quantune.cli.problems import render
from quantune.outputs import write_output
from quantune.recipe.migrate.files import Migrated, migrate_files, yaml_files
from quantune.recipe.migrate.report import Entry
from quantune.recipe.migrate.writing import shown

COLORS = {"translated": "green", "default": "dim", "dropped": "cyan", "refused": "bold red", "unrecognised": "bold red"}


def migrate(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE|FOLDER...", help="YAML files, or folders of them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The recipe of a single file; beside it by default.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the report as JSON; of several files it alone has every key.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Report only, write no recipe.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write the recipe without what can't be translated, listed at its head.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="In how many processes it was run; batches are counted for each.")
    ] = 1,
) -> None:
    """Translate axolotl-style YAML into recipes, and account for every key.

    Every key is translated, says what quantune does anyway, is dropped with a
    reason, refused, or unrecognised. With a refused or unrecognised one nothing
    is written, unless --force, and the exit code is 2.
    """
    done = migrate_files(
        yaml_files(paths),
        options_of=registry.options_of,
        output=output,
        report=report,
        write=not check,
        force=force,
        overwrite=overwrite,
        processes=processes,
    )
    for one in done:
        _print_report(one, all_keys=len(done) == 1)
    if len(done) > 1:
        _print_summary(done)
    if not (check or force) and any(_lacks_keys(one) for one in done):
        err.print("nothing is written for a YAML with such problems; --force writes what can be and lists the rest")
    for one in done:
        if one.written is not None:
            out.print(escape(str(one.written)))
    if report is not None:
        document = {"files": [one.as_dict() for one in done]}
        write_output(report, json.dumps(document, indent=2) + "\n")
    if not all(one.migration.report.ok and one.problem is None for one in done):
        raise typer.Exit(2)


def _print_report(one: Migrated, *, all_keys: bool) -> None:
    """Every key, those last that a person has to look at."""
    report = one.migration.report
    told = [problem.message for problem in report.problems]  # of another tool's YAML each key says the same
    entries = [entry for entry in report.entries if entry.outcome != "default" and entry.note not in told]
    for entry in sorted(entries, key=_is_loud):
        if all_keys or _is_loud(entry):
            _print_entry(report.name, entry)
    for problem in report.problems:
        err.print(render(problem, err.width))
    if all_keys:
        err.print(f"{escape(shown(report.name, 200))}: {_counts(one)}")
    if one.problem:
        err.print(f"[bold red]not written:[/] {escape(one.problem)}")


def _print_entry(name: str, entry: Entry) -> None:
    place = f"{shown(name, 200)}:{entry.line}:{entry.column}"
    to = f" -> {', '.join(entry.to)}" if entry.to else ""
    what = "changed" if entry.changed else entry.outcome
    color = "yellow" if entry.changed else COLORS[entry.outcome]
    note = f": {shown(entry.note, 400)}" if entry.note else ""
    err.print(f"[bold]{escape(place)}[/] [{color}]{what}[/] {escape(shown(entry.key, 100) + shown(to, 200) + note)}")


def _is_loud(entry: Entry) -> bool:
    return entry.outcome in ("refused", "unrecognised") or entry.changed


def _lacks_keys(one: Migrated) -> bool:
    """Whether a recipe is there that lacks what can't be translated."""
    return one.migration.recipe is not None and not one.migration.report.ok


def _counts(one: Migrated) -> str:
    report = one.migration.report
    counts = [f"{count} {outcome}" for outcome, count in report.counts.items() if count]
    if report.problems:
        counts.append(f"{len(report.problems)} problem{'s' if len(report.problems) != 1 else ''}")
    return ", ".join(counts) or "nothing read"


def _print_summary(done: list[Migrated]) -> None:
    """A line for each file."""
    names = [shown(one.migration.report.name, 200) for one in done]
    width = max(map(len, names))
    for one, name in zip(done, names, strict=True):
        err.print(f"{escape(name.ljust(width))}  {one.migration.report.kind:<12}  {_counts(one)}")
