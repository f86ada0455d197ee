"""`quantune explain`: what a code means."""

from __future__ import annotations

import json
from typing import Annotated

import attrs
import typer
from rich.markup import escape

from quantune.cli.console import out, table
from quantune.recipe.codes import CODES
from quantune.recipe.explanations import find, text


def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="A code such as QT012, in any case; 12 will do.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a code that a problem of a recipe has, with an example and how it is corrected; list all without one."""
    chosen = CODES if code is None else dict([find(code)])
    if as_json:
        rows = [{"code": name, **attrs.asdict(entry)} for name, entry in sorted(chosen.items())]
        out.print_json(json.dumps(rows if code is None else rows[0]))
        return
    if code is None:
        shown = table("code", "what it means")
        for name, entry in sorted(chosen.items()):
            shown.add_row(name, escape(entry.title))
        out.print(shown)
        return
    for name, entry in chosen.items():
        out.print(text(name, entry), markup=False, end="")
