"""`quantune run`: train what a recipe says."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from quantune.cli.console import fail_with, given_arguments, meaning, out, quiet_libraries, waiting_for, warn, warning
from quantune.cli.progress import ConsoleObserver, print_result
from quantune.cli.recipes import open_recipe
from quantune.distributed import worker
from quantune.distributed.environment import attempt, launched, rank
from quantune.distributed.stopping import Phase, StopRequest
from quantune.errors import DistributedError, InputError
from quantune.recipe.changes import require_allowable

if TYPE_CHECKING:
    from quantune.checkpoint.run_folder import Mode
    from quantune.errors import Problem
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
        typer.Option(metavar="N|auto", help="Processes on this machine, as distributed.processes."),
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
    if resume + resume_or_start + overwrite > 1:
        raise InputError("--resume, --resume-or-start and --overwrite are three different things; give one of them")
    if allow_changes and not (resume or resume_or_start):
        raise InputError("--allow-change goes with --resume: a run that starts has nothing to differ from")
    require_allowable(allow_changes or ())
    if processes is not None:
        overrides = [*(overrides or ()), f"distributed.processes={_toml(processes)}"]
    train_here = functools.partial(
        _train,
        allow_changes=allow_changes or (),
        allow_remote_code=trust_remote_code,
        as_json=as_json,
    )
    try:
        with StopRequest(warning).listening() as stop:
            if not worker.enter(launches=nodes > 1 or rendezvous is not None):
                return
            told = worker.told_by_another()
            checked = open_recipe(recipe, overrides or (), resume=resume, warned=_unheard if told else warn)
            mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
            if resume_or_start or attempt():  # started again by a launcher, after a process died
                going_on = _going_on(Path(checked.output.dir), mode)
                if going_on is None:
                    return
                mode = going_on
            if launched():
                train_here(checked, mode, stop)
                return

            quiet_libraries()
            from quantune.distributed.launch import Nodes, launch, local_processes

            machines = Nodes(count=nodes, rank=node_rank, rendezvous=rendezvous)
            count = local_processes(checked.distributed, checked.training.device)
            if count * machines.count == 1:
                train_here(checked, mode, stop)
                return
            _require_folder(Path(checked.output.dir), mode, machines.rank)
            if machines.count > 1:
                waiting_for(f"waiting for {machines.count} machines to meet at {machines.rendezvous}")
            stop.enter(Phase.LOADING)
            command = ("-m", "quantune", *given_arguments())
            exit_code = launch(command, count, machines, checked.distributed, fail_with)
    except KeyboardInterrupt as error:  # typer would end without a word
        exit_code = worker.end(error, functools.partial(meaning, False))
    raise typer.Exit(exit_code)


def _require_folder(path: Path, mode: Mode, machine: int) -> None:
    """Refuse what rank 0 will refuse, before anything is started."""
    from quantune.checkpoint.run_folder import RunFolder

    if machine == 0:
        with RunFolder.open(path, mode):
            return


def _going_on(path: Path, mode: Mode) -> Mode | None:
    """How to go on with a run that was begun with `mode`, or was not; None where it is finished."""
    from quantune.checkpoint.run_folder import RunFolder

    going_on = RunFolder(path).going_on(mode)
    if going_on is None and rank() == 0:
        out.print(f"the run in {path} is finished already; whether this recipe is still its own was not looked at")
    return going_on


def _train(
    checked: Recipe,
    mode: Mode,
    stop: StopRequest,
    *,
    allow_changes: Sequence[str],
    allow_remote_code: bool,
    as_json: bool,
) -> None:
    """Train in this process, alone or as one of several."""
    with worker.run_folder(Path(checked.output.dir), mode) as folder, ConsoleObserver(checked) as observer:
        observer.phase("importing torch and transformers")
        quiet_libraries()
        from quantune.distributed.world import World
        from quantune.training.run import train

        world = World.from_environment()
        if attempt():
            observer.warning(f"a process of the run died: this is attempt {attempt() + 1}")
        for sentence in worker.without_effect(checked.distributed):
            observer.warning(sentence)
        result = train(
            checked,
            folder,
            observer,
            world=world,
            resume=mode == "resume",
            allow_changes=allow_changes,
            allow_remote_code=allow_remote_code,
            watching=lambda timeout: worker.watching(timeout, lambda text: fail_with(DistributedError(text))),
            stop=stop,
        )
    if not world.main:
        return
    if as_json:
        out.print_json(json.dumps(attrs.asdict(result), default=str))
    else:
        print_result(result, packs=checked.training.qat is not None)


def _unheard(problem: Problem) -> None:
    """Another process tells of what this one found as well."""


def _toml(processes: str) -> str:
    return processes if processes.isdigit() else json.dumps(processes)
