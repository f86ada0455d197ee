"""`quantune migrate`: recipes from the YAML of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from quantune.cli.console import err, out, table
from quantune.cli.problems import render
from quantune.recipe.migrate.files import Migrated, migrate_files, yaml_files
from quantune.recipe.migrate.report import OUTCOMES, Entry
from quantune.recipe.migrate.writing import shown

COLORS = {"translated": "green", "default": "dim", "dropped": "cyan", "refused": "bold red", "unrecognised": "bold red"}


def migrate(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE|FOLDER...", help="YAML files, or folders of them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The recipe of a single file; beside it by default.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON.")] = None,
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

    Every key is translated, says what quantune does anyway, is dropped with a reason, refused, or unrecognised. With a
    refused or unrecognised one nothing is written, unless --force, and the exit code is 2.
    """
    done = migrate_files(
        yaml_files(paths),
        output=output,
        write=not check,
        force=force,
        overwrite=overwrite,
        processes=processes,
    )
    for one in done:
        _print_report(one, all_keys=len(done) == 1)
    if len(done) > 1:
        _print_summary(done)
    if report is not None:
        document = {"files": [one.as_dict() for one in done]}
        report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for one in done:
        if one.written is not None:
            out.print(escape(str(one.written)))
    if not all(one.migration.report.ok and one.problem is None for one in done):
        raise typer.Exit(2)


def _print_report(one: Migrated, *, all_keys: bool) -> None:
    report = one.migration.report
    for entry in report.entries:
        loud = entry.outcome in ("refused", "unrecognised") or entry.changed
        if loud or (all_keys and entry.outcome != "default"):
            _print_entry(report.name, entry)
    for problem in report.problems:
        err.print(render(problem, err.width))
    if all_keys:
        counts = [f"{count} {outcome}" for outcome, count in report.counts.items() if count]
        err.print(f"{escape(shown(report.name, 200))}: {', '.join(counts) or 'nothing read'}")
    if one.problem:
        err.print(f"[bold red]not written:[/] {escape(one.problem)}")


def _print_entry(name: str, entry: Entry) -> None:
    place = f"{shown(name, 200)}:{entry.line}:{entry.column}"
    to = f" -> {', '.join(entry.to)}" if entry.to else ""
    what = "changed" if entry.changed else entry.outcome
    color = "yellow" if entry.changed else COLORS[entry.outcome]
    note = f": {shown(entry.note, 400)}" if entry.note else ""
    err.print(f"[bold]{escape(place)}[/] [{color}]{what}[/] {escape(shown(entry.key, 100) + shown(to, 200) + note)}")


def _print_summary(done: list[Migrated]) -> None:
    made = table("file", "kind", *(f">{outcome}" for outcome in OUTCOMES), ">problems", "recipe")
    for one in done:
        report = one.migration.report
        counts = [str(report.counts[outcome]) for outcome in OUTCOMES]
        written = str(one.written) if one.written is not None else "-"
        made.add_row(escape(shown(report.name, 200)), report.kind, *counts, str(len(report.problems)), escape(written))
    err.print(made)
