"""What the command line prints: errors, tables, and a run as it goes on."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from quantune.backends.discovery import require_readable_packages
from quantune.cli.problems import render
from quantune.errors import EXIT_ABORTED, EXIT_BUG, InterruptedRun, Problem, QuantuneError, RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from quantune.distributed.worker import Speak

_GIVEN = sys.argv[1:]
out = Console(emoji=False, highlight=False, soft_wrap=True)
"""Results."""
err = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)
"""Progress and errors."""


def given_arguments() -> list[str]:
    """The command line as it was given, `--debug` included."""
    return _GIVEN


def fail_with(error: QuantuneError) -> None:
    """Print an error."""
    fail(error, debug=False)


def fail(error: QuantuneError, debug: bool, before: str = "") -> int:
    """Print an error, with `before` before it, and return the exit code it stands for."""
    if debug:
        err.print(escape("".join(traceback.format_exception(error))))
    if isinstance(error, RecipeError):
        for problem in error.problems:
            err.print(render(problem, err.width))
        count = len(error.problems)
        more = f"; [cyan]quantune explain {error.problems[0].code}[/] tells more" if count else ""
        err.print(f"[bold red]{count} problem{'s' if count != 1 else ''}[/] in the recipe{more}")
    elif isinstance(error, InterruptedRun):
        err.print(f"[bold yellow]interrupted:[/] {escape(str(error))}")  # whichever rank says so
    else:
        err.print(f"[bold red]error:[/] {before}{escape(str(error))}")
    return error.exit_code


def meaning(debug: bool, error: BaseException) -> tuple[int, Speak]:
    """The exit code that an error stands for, and what prints it behind a few words."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_ABORTED, lambda before: err.print(
            "[bold yellow]aborted:[/] what was saved before stays; --resume goes on from there"
        )
    if isinstance(error, OSError):  # a disk that is full, an output that is closed
        words = (error.filename, error.strerror or error)
        error = QuantuneError(": ".join(str(word) for word in words if word)).with_traceback(error.__traceback__)
    if isinstance(error, QuantuneError):
        return error.exit_code, functools.partial(fail, error, debug)
    return EXIT_BUG, functools.partial(report_bug, error)


def report_bug(error: BaseException, before: str = "") -> None:
    """Print an error that nobody foresaw, and how to report it."""
    err.print(escape("".join(traceback.format_exception(error))))
    err.print(
        f"[bold red]bug:[/] {before}quantune ended on an error that it should have foreseen: "
        f"{escape(type(error).__name__)}: {escape(str(error))}\n"
        "Please report it: what is above, the recipe, and the output of pip freeze"
    )


def warn(problem: Problem) -> None:
    """Print something that was understood and should be written otherwise."""
    err.print("[bold yellow]warning:[/] ", end="")
    err.print(render(problem, err.width))


def warning(text: str) -> None:
    """Print something that the person should know."""
    err.print(f"[bold yellow]warning:[/] {escape(text)}")


def waiting_for(text: str) -> None:
    """Print what nothing happens before."""
    err.print(f"[dim]{escape(text)}[/]")


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen; call before they are imported.

    Raises:
        BackendError: an installed package is damaged so that none of them can be imported.
    """
    require_readable_packages()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # among others, that a machine has no name
    import logging
    import warnings

    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|torchao|bitsandbytes)(\..*)?")
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def size(nbytes: float) -> str:
    """Bytes for people, e.g. `8.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def table(*columns: str, title: str | None = None) -> Table:
    """A table in the house style; columns that start with `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column.startswith(">")  # numbers are never cut or broken; text is folded
        made.add_column(
            column.removeprefix(">"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return made
