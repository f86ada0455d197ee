"""`quantune schema`: the recipe language for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantune.backends import registry
from quantune.backends.discovery import in_words
from quantune.cli.console import err, out, warning
from quantune.errors import BackendError
from quantune.recipe.json_schema import backend_schema, recipe_schema


def schema(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it to a file, replacing what is there.")
    ] = None,
) -> None:
    """Write a JSON Schema of the recipe, with the options of every installed backend.

    Editors complete and check recipes with it; docs/editors.md says how.
    """
    text = schema_text()
    if output is None:
        out.print(text, markup=False, end="")
    else:
        output.write_text(text, encoding="utf-8")
        err.print(f"[green]wrote[/] {output}", markup=True)


def schema_text() -> str:
    """The schema as JSON; a backend that can't be described is left out with a warning."""
    backends: dict[str, dict[str, Any]] = {}
    for found in registry.find():
        try:
            description = registry.load_description(found)
            described = backend_schema(found.name, description.options)
            json.dumps(described, allow_nan=False)
        except BackendError as error:
            warning(f"left out of the schema: {error}")
        except Exception as error:  # annotations and defaults are the plugin's code and can be anything
            warning(f'left out of the schema: the options of backend "{found.name}" can\'t be read: {in_words(error)}')
        else:
            backends[found.name] = described
    return json.dumps(recipe_schema(backends), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
