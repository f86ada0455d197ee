"""`quantune check`: is this recipe right, and what does it say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from quantune.cli.console import err, out, warn
from quantune.cli.problems import as_dict
from quantune.cli.recipes import open_recipe
from quantune.errors import Problem, RecipeError
from quantune.recipe.resolve import to_dict, to_toml


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the recipe, or its problems, as JSON.")] = False,
) -> None:
    """Validate a recipe without loading anything, and print it with every default written out."""
    warnings: list[Problem] = []
    try:
        checked = open_recipe(recipe, overrides or (), warned=warnings.append if as_json else warn)
    except RecipeError as error:
        if not as_json:
            raise
        told = {"problems": error.problems, "warnings": (*warnings, *error.warnings)}
        out.print_json(json.dumps({key: [as_dict(one) for one in problems] for key, problems in told.items()}))
        raise typer.Exit(error.exit_code) from error
    if as_json:
        out.print_json(json.dumps({**to_dict(checked), "warnings": [as_dict(warning) for warning in warnings]}))
        return
    out.print(to_toml(checked), markup=False, end="")
    err.print(f"[green]{escape(str(recipe))} is right[/]")
