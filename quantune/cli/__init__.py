"""The command line: parses, calls, prints."""

from __future__ import annotations

import functools
import sys
from typing import Annotated

import typer

import quantune
from quantune.cli import backends, check, explain, generate, history, init, merge, migrate, quantize, run, schema
from quantune.cli.console import meaning
from quantune.distributed import worker

app = typer.Typer(
    name="quantune",
    help="Fine-tune language models with LoRA on a quantized, frozen base, from one recipe.",
    epilog="--debug, anywhere on the line, shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("init")(init.init)
app.command("schema")(schema.schema)
app.command("generate")(generate.generate)
app.command("history")(history.history)
app.command("merge")(merge.merge)
app.command("migrate")(migrate.migrate)
app.command("quantize")(quantize.quantize)
app.add_typer(backends.app, name="backends")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"quantune {quantune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA on a quantized, frozen base, from one recipe."""


def main() -> None:
    """Run the command line; deliberate errors become a message and an exit code, never a traceback.

    `--debug`, anywhere on the line, shows the traceback as well.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        sys.exit(worker.end(error, functools.partial(meaning, debug)))
