"""`quantune merge`: base and adapter into one checkpoint."""

from __future__ import annotations

import json
import math
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer
from rich.markup import escape
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from quantune.cli.bar import Bar
from quantune.cli.console import err, out, quiet_libraries, size, warning
from quantune.cli.merge_figures import print_verification, print_ways
from quantune.cli.recipes import open_recipe
from quantune.errors import EXIT_ABORTED, InputError
from quantune.merge import REPORT
from quantune.streaming.output import PARTIAL, require_free, require_shard_size

if TYPE_CHECKING:
    from quantune.merge.comparison import WaysTable
    from quantune.merge.request import MergeResult, Setting
    from quantune.merge.trained import TrainedAdapter
    from quantune.recipe.schema import Recipe


class Onto(str, Enum):
    """The values of `--onto`."""

    dequantized = "dequantized"
    original = "original"
    packed = "packed"


class Dtype(str, Enum):
    """The values of `--dtype`."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Device(str, Enum):
    """The values of `--device`."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def merge(
    trained: Annotated[
        Path | None, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run, or of an adapter.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="FOLDER[:WEIGHT]", help="One of several adapters to add up, e.g. --adapter runs/a:0.7."
        ),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="A new folder; by default `merged` in the run's.")
    ] = None,
    onto: Annotated[
        Onto,
        typer.Option(
            "--onto",
            help="dequantized: the base as it was trained on, exactly. original: the unquantized base, which is an "
            "approximation. packed: packed again in the same format.",
        ),
    ] = Onto.dequantized,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What the weights are written in; by default what the base has.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="E.g. 5GB; by default files like the base's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Where the base is, if not where it was trained on.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="How the adapter was trained, where its folder does not say."),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to pack and add.")] = Device.auto,
    aware: Annotated[
        bool,
        typer.Option(
            "--aware",
            help="With --onto packed: choose the roundings for what the layers read on the training data. Keeps far "
            "more of the adapter, and takes a few passes over a sample of it.",
        ),
    ] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the merged model with base and adapter; by default where it fits into half of what memory is "
            "free.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Merge in every way, print what each keeps, and write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Merge although the base is another one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of an earlier merge.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow code that comes with the base to run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, as a checkpoint that transformers loads."""
    named = _named(trained, adapters)
    given = onto is not Onto.dequantized or aware or overwrite or verify is not None or out_folder is not None
    if compare and given:
        raise InputError(
            "--compare merges in every way, measures each and writes nothing; leave out --onto, --aware, --out, "
            "--overwrite and --verify"
        )
    if aware and onto is not Onto.packed:
        raise InputError(
            f"--aware chooses how weights are packed, and --onto {onto.value} packs none; "
            "add --onto packed, or leave it out"
        )
    require_shard_size(max_shard_size)
    where_to = _out(named, out_folder, compare)
    if not compare:
        require_free(where_to, REPORT, overwrite=overwrite)
    try:
        with ConsoleObserver(quiet=as_json) as observer:
            observer.phase("importing torch and transformers")
            quiet_libraries()
            from quantune.merge.merge import merge
            from quantune.merge.request import WRITTEN_IN, MergeRequest
            from quantune.merge.trained import find_adapter
            from quantune.merge.ways import compare_ways
            from quantune.model.device import choose_device

            weights = tuple(weight for _, weight in named)
            found = tuple(find_adapter(folder) for folder, _ in named)
            base = None if base is None else os.path.abspath(base) if os.path.isdir(base) else base
            recipes = _recipes(found, base, recipe)
            request = MergeRequest(
                adapters=found,
                weights=weights,
                setting=_setting(found, recipes, weights, base),
                recipe=recipes[0],
                out=where_to,
                onto=onto.value,
                dtype=None if dtype is None else WRITTEN_IN[dtype.value],
                max_shard_size=max_shard_size,
                force=force,
                overwrite=overwrite,
                aware=aware,
                verify=verify,
                trust_remote_code=trust_remote_code,
            )
            do = compare_ways if compare else merge
            made = do(request, choose_device(device.value), observer)
    except KeyboardInterrupt:  # typer would end without a word
        print_aborted(where_to)
        raise typer.Exit(EXIT_ABORTED) from None
    _print(made, as_json=as_json, way="packed, aware" if aware else onto.value)


def _print(made: MergeResult | WaysTable, *, as_json: bool, way: str) -> None:
    """What came of it, on standard output."""
    from quantune.merge.request import MergeResult

    if as_json:
        document = attrs.asdict(made)
        if isinstance(made, MergeResult) and made.verification is not None:
            document["verification"]["kept"] = made.verification.kept
        out.print_json(json.dumps(document, default=str))
    elif isinstance(made, MergeResult):
        print_result(made, way)
    else:
        print_ways(made)


def print_result(result: MergeResult, way: str) -> None:
    """What was merged in which way, on standard output."""
    parts = [f"{result.merged} weights merged"]
    if result.dequantized:
        parts.append(f"{result.dequantized} dequantized as they were trained on")
    if result.packed:
        parts.append(f"{result.packed} packed as they were trained on")
    parts.append(f"{result.kept} tensors as they were")
    out.print(f"[bold]{escape(str(result.folder))}[/]  {size(result.nbytes)} in {result.seconds:.1f} s")
    onto = way.partition(",")[0]
    out.print(f"{', '.join(parts)}; {result.dtype}, onto the {onto} base")
    if result.verification is not None:
        print_verification(result.verification, way=way, exact=result.exact)


class ConsoleObserver(Bar):
    """Shows a merge on standard error: a progress bar for a person, a line a phase otherwise."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(), quiet=quiet)

    def phase(self, text: str) -> None:
        self.bar.update(self.task, description=escape(text))
        if not self.quiet and not err.is_terminal:
            err.print(f"[dim]{escape(text)}[/]")

    def begin(self, nbytes: int) -> None:
        self.bar.update(self.task, total=nbytes, completed=0)

    def wrote(self, nbytes: int) -> None:
        self.bar.advance(self.task, nbytes)

    def note(self, text: str) -> None:
        err.print(escape(text))

    def warning(self, text: str) -> None:
        warning(text)


def _named(trained: Path | None, adapters: list[str] | None) -> list[tuple[Path, float]]:
    """The folders that were named, and what each update is multiplied with."""
    if (trained is None) == (not adapters):
        raise InputError(
            "expected the folder of a run or of an adapter, or --adapter once or more; give one of the two"
        )
    return [(trained, 1.0)] if trained is not None else [_weighted(text) for text in adapters or ()]


def _weighted(text: str) -> tuple[Path, float]:
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(weight)
        if not math.isfinite(number):
            raise ValueError
        return Path(folder), number
    except ValueError:
        raise InputError(f"--adapter: expected FOLDER:WEIGHT with a number, e.g. runs/a:0.7, found {text}") from None


def _recipes(adapters: tuple[TrainedAdapter, ...], base: str | None, recipe: Path | None) -> tuple[Recipe | None, ...]:
    """How each adapter was trained, None where nobody says."""
    overrides = () if base is None else (f"model.base={json.dumps(base)}",)
    told = next((adapter for adapter in adapters if adapter.recipe is not None), None)
    if recipe is not None and told is not None:
        raise InputError(
            f"--recipe: {told.folder} says itself how its adapter was trained, in {told.recipe}; leave it out"
        )
    sources = [recipe or adapter.recipe for adapter in adapters]
    return tuple(None if source is None else open_recipe(source, overrides, data=False) for source in sources)


def _setting(
    adapters: tuple[TrainedAdapter, ...],
    recipes: tuple[Recipe | None, ...],
    weights: tuple[float, ...],
    base: str | None,
) -> Setting:
    """What the adapters were trained on, which is one thing for all of them."""
    from quantune.merge.request import Setting, require_one_setting

    settings = []
    for adapter, recipe in zip(adapters, recipes, strict=True):
        if recipe is not None:
            settings.append(Setting.of(recipe))
        else:
            settings.append(Setting.of_another_tool(adapter, base))
            warning(
                f"the adapter in {adapter.folder} does not say how its base was quantized: it is merged onto the base "
                "as it is. --recipe FILE says otherwise"
            )
    return require_one_setting(settings, weights)


def _out(named: list[tuple[Path, float]], given: Path | None, compare: bool) -> Path:
    """Where the merged model goes."""
    if given is not None:
        return given
    folder = named[0][0]
    run = folder.parent if folder.resolve().name == "adapter" and _is_run(folder.parent) else folder
    if compare or (len(named) == 1 and (_is_run(run) or not folder.is_dir())):
        return run / "merged"
    what = "an adapter folder" if len(named) == 1 else "the sum of several adapters"
    raise InputError(f"expected --out DIR: {what} has no run to put the merged model into")


def _is_run(folder: Path) -> bool:
    return (folder / "status.json").is_file()


def print_aborted(out_folder: Path) -> None:
    """Say what Ctrl-C left."""
    partial = out_folder.with_name(out_folder.name + PARTIAL)
    complete = any(partial.glob("*.safetensors"))
    left = f"what is complete waits in {partial}, and the same command goes on with it" if complete else ""
    err.print(f"[bold yellow]aborted[/]{': ' if left else ''}{escape(left)}")
