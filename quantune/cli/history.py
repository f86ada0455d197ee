"""`quantune history`: what every attempt of a run did, and whether the run is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer
from rich.markup import escape

from quantune.cli.console import err, out, table
from quantune.errors import EXIT_FAILURE, InputError

if TYPE_CHECKING:
    from quantune.checkpoint.audit import Verdict


def history(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the attempts of a run, and check that each step happened once, in order, with its samples."""
    from quantune.checkpoint.audit import audit
    from quantune.checkpoint.run_folder import RunFolder

    rows = RunFolder(run).history.rows()
    if not rows:
        raise InputError(f"expected the folder of a run, found no history in {run}")
    verdict = audit(rows)
    if as_json:
        out.print_json(json.dumps(attrs.asdict(verdict) | {"sound": verdict.sound}))
    else:
        _print(verdict)
    if not verdict.sound:
        raise typer.Exit(EXIT_FAILURE)


def _print(verdict: Verdict) -> None:
    rows = table(">attempt", ">processes", "host", ">from step", ">to step", "checkpoints", "end")
    for attempt in verdict.attempts:
        begun = "0" if attempt.resumed is None else f"{attempt.resumed}"
        saved = ", ".join(map(str, attempt.checkpoints)) or "none"
        host = escape(attempt.host)
        rows.add_row(f"{attempt.number}", f"{attempt.processes}", host, begun, f"{attempt.last}", saved, attempt.end)
    out.print(rows)
    for attempt in verdict.attempts:
        for reason in attempt.passed_over:
            out.print(f"attempt {attempt.number} found {escape(reason)}")
    again = f"; {verdict.done_again} were lost with an attempt and done again" if verdict.done_again else ""
    if verdict.sound:
        out.print(
            f"[green]sound[/]: {verdict.steps} of {verdict.total} steps, each once, in order, with its samples{again}"
        )
    for problem in verdict.problems:
        err.print(f"[bold red]not sound:[/] {escape(problem)}")
