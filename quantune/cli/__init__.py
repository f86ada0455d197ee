"""The command line: parses, calls, prints."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import quantune
import quantune.errors
from quantune.cli import backends, check, explain, generate, history, init, migrate, run, schema
from quantune.cli.console import err, fail, report_bug
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
app.command("migrate")(migrate.migrate)
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
            if error.code != quantune.errors.EXIT_ABORTED:
                raise
            error = KeyboardInterrupt()  # which is what typer makes that of
        sys.exit(worker.end(error, *_ending(error, debug)))


def _ending(error: BaseException, debug: bool) -> tuple[int, Callable[[str], object]]:
    """The exit code that an error stands for, and what prints it behind a few words."""
    if isinstance(error, KeyboardInterrupt):
        return quantune.errors.EXIT_ABORTED, lambda before: err.print(f"{before}aborted")
    if isinstance(error, OSError) and not debug:  # a disk that is full, an output that is closed
        error = quantune.errors.QuantuneError(": ".join(str(word) for word in (error.filename, error.strerror or error) if word))
    if isinstance(error, quantune.errors.QuantuneError):
        return error.exit_code, functools.partial(fail, error, debug)
    return quantune.errors.EXIT_BUG, functools.partial(report_bug, error)
