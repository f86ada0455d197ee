"""`quantune quantize`: a checkpoint packed into a format that other libraries read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from quantune.cli.compare import Device, named_model
from quantune.cli.console import out, quiet_libraries, size, table
from quantune.cli.merge import ConsoleObserver, print_aborted
from quantune.errors import EXIT_ABORTED, InputError
from quantune.quantize import REPORT
from quantune.quantize.choice import choose
from quantune.recipe.schema import ModelConfig
from quantune.streaming.output import require_free, require_shard_size

if TYPE_CHECKING:
    from quantune.comparison.rows import LayerFigures
    from quantune.quantize.quantize import Quantized


def quantize(
    model: Annotated[str, typer.Argument(help="A folder in the transformers format, a hub id, or builtin:mini.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; it must not exist.")],
    backend: Annotated[str, typer.Option("--backend", help="What packs the weights: bnb, torchao, fp8 or mxfp4.")],
    weight_dtype: Annotated[
        str | None, typer.Option("--weight-dtype", help="The format of the weights, e.g. nf4 or int8.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the backend, e.g. group_size=64."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="NAME", help="Modules to keep in full precision, as in a recipe's skip."),
    ] = None,
    activation_dtype: Annotated[
        str | None,
        typer.Option("--activation-dtype", help="int8 or fp8: round activations as well, where the model is used."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="No file larger than this, e.g. 5GB.")
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to pack.")] = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that this command wrote.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Pack a model's weights, tensor by tensor, into a checkpoint that transformers reads.

    The embeddings, the output head, routers and whatever --skip names stay as they are.
    """
    choice = choose(backend, weight_dtype, settings=settings or (), skip=skip or (), activation_dtype=activation_dtype)
    if (Path(model) / "recipe.toml").is_file() and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"expected a model, found the folder of a run: quantune merge {model} makes a model of it, and quantune "
            f"quantize {Path(model) / 'merged'} packs that"
        )
    require_shard_size(max_shard_size)
    require_free(folder, REPORT, overwrite=overwrite)
    config = ModelConfig(base=named_model(model), trust_remote_code=trust_remote_code)
    try:
        with ConsoleObserver(quiet=as_json) as observer:
            observer.phase("importing torch and transformers")
            quiet_libraries()
            from quantune.model.base import open_base
            from quantune.model.device import choose_device
            from quantune.quantize.quantize import quantize as pack

            base = open_base(config, allow_remote_code=trust_remote_code)
            made = pack(
                base,
                choice,
                folder,
                device=choose_device(device.value),
                observer=observer,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
            )
    except KeyboardInterrupt:  # typer would end without a word
        print_aborted(folder)
        raise typer.Exit(EXIT_ABORTED) from None
    if as_json:
        out.print_json(json.dumps({"folder": str(made.folder), **made.as_dict()}, allow_nan=False))
    else:
        _print(made, choice.format)


def _print(made: Quantized, format: str) -> None:
    """The error of each kind of layer, and where the folder is."""
    shown = table("layers", ">count", ">weights", ">bits", ">error", ">SNR dB")
    for kind in (*made.kinds, made.total):
        shown.add_row(*_cells(kind))
    out.print(shown)
    out.print(
        f"[bold]{escape(str(made.folder))}[/]: {escape(format)}, {size(made.before)} became {size(made.nbytes)}; "
        f"read by {made.library}"
    )


def _cells(kind: LayerFigures) -> tuple[str, ...]:
    snr = "-" if kind.snr_db is None else f"{kind.snr_db:.1f}"
    return (
        escape(kind.kind),
        str(kind.layers),
        f"{kind.weights:,}",
        f"{kind.bits_per_weight:.2f}",
        f"{kind.relative_error:.2%}",
        snr,
    )
