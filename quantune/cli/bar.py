"""The progress bar that commands show a person, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn

from quantune.cli.console import err

Self = TypeVar("Self", bound="Bar")


class Bar:
    """A spinner, what is being done, a bar, and the columns of a command; gone once the context is left.

    Where nobody watches, or with `quiet`, nothing is drawn.
    """

    def __init__(self, *columns: ProgressColumn, quiet: bool = False, **fields: Any) -> None:
        self.quiet = quiet
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=err,
            transient=True,
            disable=quiet or not err.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None, **fields)

    def __enter__(self: Self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
