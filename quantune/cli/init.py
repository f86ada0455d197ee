"""`quantune init`: a first recipe, which checks and runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from quantune.backends import registry
from quantune.backends.options import choose_dtype, default_options
from quantune.backends.schemas import installed_schema
from quantune.cli.console import err, warning
from quantune.recipe.schema import Format
from quantune.recipe.starter import (
    Choice,
    base_in,
    data_in,
    recipe_text,
    sample_beside,
    sample_of,
    schema_beside,
    write_new,
)


def init(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.toml"
    ),
    base: Annotated[str, typer.Option("--base", help="A local folder, a hub id, or builtin:mini.")] = "builtin:mini",
    backend: Annotated[str, typer.Option("--backend", help="A backend that `quantune backends list` shows.")] = "bnb",
    weight_dtype: Annotated[
        str | None, typer.Option("--weight-dtype", help="A format of the backend, its default if there is one.")
    ] = None,
    task: Annotated[Format, typer.Option("--task", help="What the rows of the data are.")] = "chat",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="The training data; without it, a sample is written.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Write a JSON Schema beside the recipe, for editors.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a recipe and a schema that are there; data never.")
    ] = False,
) -> None:
    """Write a commented recipe for a model, a backend and a task."""
    description = registry.describe(backend)
    dtype = choose_dtype(description, weight_dtype)
    default_options(description, dtype)  # a backend that needs more keys than these refuses them
    choice = Choice(
        base=base_in(output, base),
        backend=description.name,
        options=description.options,
        weight_dtype=dtype,
        task=task,
        data=data_in(output, data) if data else sample_of(task),
        schema=f"./{schema_beside(output).name}" if schema else None,
    )
    rows, sample = (data, {}) if data else sample_beside(output, task)
    files = {output: recipe_text(choice, str(output)), **sample}
    if schema:
        files[schema_beside(output)], left_out = installed_schema()
        for reason in left_out:
            warning(f"left out of the schema: {reason}")
    write_new(files, force=force)
    for path in files:
        err.print(f"wrote {escape(str(path))}")
    if not data and not sample:
        err.print(f"kept {escape(str(rows))}, which was there; the recipe reads it as {task}")
    probe = registry.probe_of(description)
    if not probe.available:
        warning(f'backend "{description.name}" can\'t run here: {probe.reason}')
    err.print(f"next: quantune run {escape(str(output))}")
