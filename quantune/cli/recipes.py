"""Opening a recipe the way every command does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from quantune.backends.checkpoints import format_problem
from quantune.backends.registry import backends_with_option, options_of
from quantune.cli.console import warn
from quantune.errors import Problem
from quantune.recipe.load import load_recipe
from quantune.recipe.preflight import any_format, check_files, file_findings
from quantune.recipe.resolve import with_absolute_paths
from quantune.recipe.schema import Recipe
from quantune.recipe.structure import Finding


def open_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    data: bool = True,
    resume: bool = False,
    warned: Callable[[Problem], None] = warn,
) -> Recipe:
    """Load and check a recipe and the files it names; its paths are absolute afterwards.

    Without `data` the data files may be gone: answering needs the base alone. With `resume` the adapter to start from
    may be gone: the checkpoint has its weights. `warned` is given each warning.

    Raises:
        RecipeError: with every problem there is.
    """

    start = data and not resume

    def files(recipe: Recipe, sound: Collection[str]) -> list[Finding]:
        known = format_problem if "quantization" in sound else any_format
        return file_findings(with_absolute_paths(recipe, path), data=data, start=start, format_problem=known)

    loaded = load_recipe(
        path, options_of=options_of, backends_with=backends_with_option, overrides=overrides, files=files
    )
    for warning in loaded.warnings:
        warned(warning)
    recipe = with_absolute_paths(loaded.recipe, path)
    check_files(loaded, recipe, data=data, start=start, format_problem=format_problem)
    return recipe
