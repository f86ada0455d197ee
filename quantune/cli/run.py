"""`quantune run`: train what a recipe says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from quantune.cli.console import fail_with, given_arguments, out, quiet_libraries
from quantune.cli.progress import ConsoleObserver, print_result
from quantune.cli.recipes import open_recipe
from quantune.distributed import worker
from quantune.distributed.environment import attempt, launched
from quantune.errors import EXIT_ABORTED, DistributedError, InputError
from quantune.recipe.changes import require_allowable

if TYPE_CHECKING:
    from quantune.checkpoint.run_folder import Mode
    from quantune.recipe.schema import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Go on with a run, or start it where none is: for launchers that repeat the same command.",
        ),
    ] = False,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="SECTION.KEY",
            help="With --resume: go on although this key of the recipe changed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where a run already is.")] = False,
    processes: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Processes on this machine, as [distributed] processes."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, each of which runs this command.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this one is, from 0.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached by the others.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow a recipe to run code that comes with its base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a LoRA adapter as a recipe says."""
    if not worker.enter(launches=nodes > 1 or rendezvous is not None):
        return
    if resume + resume_or_start + overwrite > 1:
        raise InputError("--resume, --resume-or-start and --overwrite are three different things; give one of them")
    if allow_changes and not (resume or resume_or_start):
        raise InputError("--allow-change goes with --resume: a run that starts has nothing to differ from")
    require_allowable(allow_changes or ())
    if processes is not None:
        overrides = [
            *(overrides or ()),
            f"distributed.processes={json.dumps(processes) if processes == 'auto' else processes}",
        ]
    checked = open_recipe(recipe, overrides or (), resume=resume)

    from quantune.checkpoint.run_folder import RunFolder

    path = Path(checked.output.dir)
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    if resume_or_start:
        finished = RunFolder(path).state() == "finished"
        if finished:
            out.print(f"the run in {path} is finished already")
            return
        mode = "resume" if RunFolder(path).unfinished() else "overwrite"
    if launched():
        _train(checked, mode, allow_changes or (), trust_remote_code, as_json)
        return

    quiet_libraries()
    from quantune.distributed.launch import Nodes, launch, local_processes

    machines = Nodes(count=nodes, rank=node_rank, rendezvous=rendezvous)
    count = local_processes(checked.distributed, checked.training.device)
    if count * machines.count == 1:
        _train(checked, mode, allow_changes or (), trust_remote_code, as_json)
        return
    with RunFolder.open(path, mode):
        pass  # what is refused is refused before anything is started
    code = launch(given_arguments(), count, machines, checked.distributed)
    if code == EXIT_ABORTED:
        raise KeyboardInterrupt
    raise typer.Exit(code)


def _train(checked: Recipe, mode: Mode, allow_changes: Sequence[str], trust_remote_code: bool, as_json: bool) -> None:
    """Train in this process, alone or as one of several."""
    from quantune.checkpoint.run_folder import RunFolder

    path = Path(checked.output.dir)
    if attempt() and RunFolder(path).unfinished():  # started again after a process died
        mode = "resume"
    with worker.run_folder(path, mode) as folder, ConsoleObserver(checked) as observer:
        observer.phase("importing torch and transformers")
        quiet_libraries()
        from quantune.distributed.world import World
        from quantune.training.run import train

        world = World.from_environment()
        if attempt():
            observer.warning(f"a process died: started again, the {_ordinal(attempt())} time")
        if launched() and checked.distributed.processes not in ("auto", world.local_size):
            observer.warning(
                f"[distributed] processes = {checked.distributed.processes} has no effect: the launcher started "
                f"{world.local_size} here"
            )
        result = train(
            checked,
            folder,
            observer,
            world=world,
            resume=mode == "resume",
            allow_changes=allow_changes,
            allow_remote_code=trust_remote_code,
            watching=lambda timeout: worker.watching(timeout, lambda text: fail_with(DistributedError(text))),
        )
    if not world.main:
        return
    if as_json:
        out.print_json(json.dumps(attrs.asdict(result), default=str))
    else:
        print_result(result)


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
