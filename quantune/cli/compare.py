"""`quantune backends compare`: what each format stores, loses and costs on a model."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from quantune.cli.bar import Bar
from quantune.cli.console import err, out, quiet_libraries, table
from quantune.comparison import chart, formats
from quantune.comparison.rows import UNQUANTIZED
from quantune.comparison.text import MAX_TOKENS, MIN_TOKENS, built_in_text, read_text
from quantune.errors import InputError, ModelError
from quantune.recipe.preflight import base_problem
from quantune.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from quantune.comparison.rows import Comparison, FormatRow


NARROW = (0, 0, 0, 1)
"""Padding with which both tables fit into 80 columns."""
DEQUANTIZE = (">dequant\nms/M", ">mem-\ncpys")
"""Headers: the time of dequantizing a million weights, and the same in memcpys."""


class Device(str, Enum):
    """The values of `--device`."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def compare(
    model: Annotated[str, typer.Argument(help="A folder in the transformers format, a hub id, or builtin:mini.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="NAMES", help="These formats, e.g. bnb:nf4,torchao:int4; torchao means all its."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="A text to measure on, in place of the built-in one.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=MIN_TOKENS, help="Use so many tokens of the text, from its beginning.")
    ] = MAX_TOKENS,
    chart_file: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE", help="Draw the formats into an .svg or .html file.")
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to compute.")] = Device.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
) -> None:
    """Load a model in every format and measure what each one stores, loses and costs.

    Formats are those of the built-in backends with their default options; installed ones of others are measured when
    --only names them.
    """
    chosen = formats.select(only)
    measured_on = built_in_text() if text is None else read_text(text)
    if chart_file is not None:
        _require_chart_file(chart_file)
    config = ModelConfig(base=named_model(model), trust_remote_code=trust_remote_code)

    with ConsoleObserver(quiet=as_json) as observer:
        observer.phase("", "importing torch and transformers")
        quiet_libraries()
        from quantune.comparison.compare import compare
        from quantune.model.base import open_base
        from quantune.model.device import choose_device, choose_precision

        where = choose_device(device.value)
        comparison = compare(
            open_base(config, allow_remote_code=trust_remote_code),
            chosen,
            text=measured_on,
            device=where,
            precision=choose_precision("auto", where),
            observer=observer,
            max_tokens=max_tokens,
        )
    if as_json:
        out.print_json(json.dumps(comparison.as_dict(), allow_nan=False, default=str))
    else:
        print_comparison(comparison)
    if chart_file is not None:  # last: a disk that is full costs the chart alone
        _write_chart(comparison, chart_file)
        err.print(f"chart: {escape(str(chart_file))}")


class ConsoleObserver(Bar):
    """Shows a comparison on standard error: a progress bar for a person, a line a format otherwise."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(MofNCompleteColumn(), TimeElapsedColumn(), quiet=quiet)

    def start(self, rows: int) -> None:
        self.bar.update(self.task, total=rows)

    def phase(self, format: str, text: str) -> None:
        self.bar.update(self.task, description=escape(f"{format}: {text}" if format else text))

    def row(self, row: FormatRow) -> None:
        self.bar.advance(self.task)
        if not self.quiet and not err.is_terminal:
            err.print(escape(f"{row.format}: {_in_short(row)}"))


def print_comparison(comparison: Comparison) -> None:
    """The figures as two tables, on standard output."""
    setting = comparison.setting
    shown = table(*("format", ">bits", ">error", ">SNR\ndB", ">perplexity", ">KL", *DEQUANTIZE, ">tokens\n/s"))
    shown.padding = NARROW
    for row in comparison.rows:
        shown.add_row(escape(row.format), *_cells(row))
    out.print(shown)
    for row in comparison.rows:
        if row.problem:
            out.print(f"[yellow]{escape(row.format)}[/] can't be measured here: {escape(row.problem)}")
    measured = [row for row in comparison.rows if row.kinds and row.format != UNQUANTIZED]
    if measured:
        kinds = list(dict.fromkeys(kind.kind for row in measured for kind in row.kinds))
        errors = table("relative error", *(f">{escape(kind)}" for kind in kinds))
        errors.padding = NARROW
        for row in measured:
            of_kind = {kind.kind: f"{kind.relative_error:.2%}" for kind in row.kinds}
            errors.add_row(escape(row.format), *(of_kind.get(kind, "-") for kind in kinds))
        out.print(errors)
    used = f"{setting.tokens:,}" + (f" of {setting.text_tokens:,}" if setting.tokens < setting.text_tokens - 1 else "")
    rows, length = setting.batch
    out.print(
        f"[bold]{escape(setting.model)}[/] on {escape(setting.device)} in {setting.precision}, {setting.threads} "
        f"threads; perplexity and KL (nats, from the unquantized model) over {used} tokens of the "
        f"{escape(setting.text)} text; training steps of {rows} x {length} tokens, LoRA r = 16 on all linear layers"
    )


def _cells(row: FormatRow) -> list[str]:
    """A row's figures as text, those it lacks as dashes."""
    if row.weights is None or row.outputs is None or row.training is None:
        return ["-"] * 8
    exact = row.format == UNQUANTIZED
    snr = row.weights.snr_db
    return [
        f"{row.weights.bits_per_weight:.2f}",
        "-" if exact else f"{row.weights.relative_error:.2%}",
        "-" if snr is None else f"{snr:.1f}",
        f"{row.outputs.perplexity:.2f}",
        "-" if exact else _kl(row.outputs.kl),
        "-" if row.dequantize is None else f"{row.dequantize.ms_per_million:.2f}",
        "-" if row.dequantize is None else f"{row.dequantize.memcpys:.1f}",
        f"{row.training.tokens_per_second:,.0f}",
    ]


def _in_short(row: FormatRow) -> str:
    if row.weights is None or row.outputs is None:
        return row.problem or "not measured"
    bits, perplexity = row.weights.bits_per_weight, row.outputs.perplexity
    return f"{bits:.2f} bits, perplexity {perplexity:.2f}, KL {_kl(row.outputs.kl)}"


def _kl(kl: float) -> str:
    return f"{kl:.5f}" if kl >= 1e-4 or kl == 0 else f"{kl:.1e}"


def named_model(model: str) -> str:
    """The model as `[model] base` would name it; folders are relative to the current directory.

    Raises:
        ModelError: there is no such folder or built-in model, or it holds no weights that can be loaded.
    """
    base = os.path.expanduser(model)
    problem = ("expected a model, found nothing", "name one") if not base.strip() else base_problem(base)
    if problem:
        message, hint = problem
        raise ModelError(message + (f"; {hint}" if hint else ""))
    return base


def _require_chart_file(path: Path) -> None:
    """Find out before measuring whether a chart can be written.

    Raises:
        InputError: the file's ending is not a chart's, or its folder is not there.
    """
    if path.suffix.lower() not in chart.SUFFIXES:
        raise InputError(f"--chart: expected a file ending in {' or '.join(chart.SUFFIXES)}, found {path}")
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"--chart: can't write {path}: {what}")


def _write_chart(comparison: Comparison, path: Path) -> None:
    try:
        path.write_text(chart.render(comparison, path.suffix.lower()), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--chart: can't write {path}: {error.strerror}") from error
