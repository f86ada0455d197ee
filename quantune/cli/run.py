"""`quantune run`: train what a recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import attrs
import typer

from quantune.cli.console import out, quiet_libraries
from quantune.cli.progress import ConsoleObserver, print_result
from quantune.cli.recipes import open_recipe
from quantune.errors import InputError
from quantune.recipe.changes import require_allowable


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="SECTION.KEY",
            help="With --resume: go on although this key of the recipe changed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where a run already is.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow a recipe to run code that comes with its base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a LoRA adapter as a recipe says."""
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite starts it again; give one of them")
    if allow_changes and not resume:
        raise InputError("--allow-change goes with --resume: a run that starts has nothing to differ from")
    require_allowable(allow_changes or ())
    checked = open_recipe(recipe, overrides or (), resume=resume)

    from quantune.checkpoint.run_folder import Mode, RunFolder

    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    with RunFolder.open(Path(checked.output.dir), mode) as folder, ConsoleObserver(checked) as observer:
        observer.phase("importing torch and transformers")
        quiet_libraries()
        from quantune.training.run import train

        result = train(
            checked,
            folder,
            observer,
            resume=resume,
            allow_changes=allow_changes or (),
            allow_remote_code=trust_remote_code,
        )
    if as_json:
        out.print_json(json.dumps(attrs.asdict(result), default=str))
    else:
        print_result(result)
