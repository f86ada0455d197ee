"""`quantune schema`: the recipe language for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from quantune.backends.schemas import installed_schema
from quantune.cli.console import err, out, warning
from quantune.outputs import write_output


def schema(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it to a file, replacing what is there.")
    ] = None,
) -> None:
    """Write a JSON Schema of the recipe, with the options of every installed backend.

    An editor completes and checks a recipe with it whose first line is `#:schema ./recipe.schema.json`.
    """
    text, left_out = installed_schema()
    for reason in left_out:
        warning(f"left out of the schema: {reason}")
    if output is None:
        out.print(text, markup=False, end="")
        return
    write_output(output, text)
    err.print(f"wrote {escape(str(output))}")
