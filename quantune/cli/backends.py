"""`quantune backends`: what can quantize here."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from quantune.backends import registry
from quantune.cli import compare
from quantune.cli.console import out, table

app = typer.Typer(help="What can quantize here, what cannot, and why.", no_args_is_help=True)
app.command("compare")(compare.compare)


@app.callback()
def root() -> None:
    """What can quantize here, what cannot, and why."""


@app.command("list")
def list_backends(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the installed backends; imports no third party's code."""
    rows = [registry.status(found) for found in registry.find()]
    if as_json:
        out.print_json(json.dumps([row.as_dict() for row in rows]))
        return
    shown = table("backend", "package", "weight_dtype", "devices", "status")
    for row in rows:
        status = f"[green]{row.status}[/]" if row.status == "available" else f"[yellow]{escape(row.status)}[/]"
        reason = f": {row.reason}" if row.reason else ""
        install = f" ({row.install})" if row.install else ""
        shown.add_row(
            escape(row.name),
            escape(f"{row.package} {row.version}"),
            ", ".join(row.weight_dtypes) or "-",
            ", ".join(row.devices) or "-",
            status + escape(reason + install),
        )
    out.print(shown)
