"""`quantune explain`: what a code of a recipe problem means, and how to put it right."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

import attrs
import typer
from rich.markup import escape

from quantune.cli.console import out
from quantune.recipe.codes import CODES, Code, find_code

WIDEST = 100


def explain(
    code: Annotated[str | None, typer.Argument(help="A code, e.g. QT012; without one, all are listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a code of a recipe problem, with an example and how it is put right."""
    codes = CODES if code is None else (find_code(code),)
    if as_json:
        told = [attrs.asdict(one) for one in codes]
        out.print_json(json.dumps(told if code is None else told[0]))
    elif code is None:
        for one in codes:
            out.print(f"[bold]{one.name}[/]  {escape(one.title)}")
    else:
        _print(codes[0])


def _print(code: Code) -> None:
    out.print(f"[bold]{code.name}: {escape(code.title)}[/]\n")
    out.print(textwrap.fill(code.explanation, min(out.width, WIDEST)), markup=False)
    out.print("\n[bold]For example[/]\n")
    out.print(textwrap.indent(code.example, "    "), markup=False)
    out.print("\n[bold]Put right[/]\n")
    out.print(textwrap.indent(code.corrected, "    "), markup=False)
