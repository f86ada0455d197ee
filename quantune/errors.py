"""Every error quantune raises on purpose.

QuantuneError                 the base: a sentence for the person who meets it, and an exit code (1)
├── InputError                something given to quantune can't be used (2), found before weights are loaded
│   ├── RecipeError           one or more problems in a recipe, each with its position
│   ├── DataError             a data file or row that can't be used
│   ├── ModelError            a base model or adapter that can't be used, or targets that match nothing
│   ├── BackendError          a backend that is unknown, or given wrong options
│   │   └── MissingBackendError   a backend that can't run here: it lacks a package, a device, or is not installed (3)
│   ├── RunFolderError        a run folder that is finished, or not a run folder
│   │   └── FolderInUseError  a run folder that another process uses (6)
│   └── ResumeError           a run that is resumed with another recipe, data or base than it was begun with
├── QuantizationError         a weight that can't be packed, or that should be packed and is not
├── NonFiniteError            a loss or gradient that is NaN or infinite (4)
├── CheckpointError           a checkpoint that is damaged, or can't be written (5)
├── DistributedError          a process of the run died or hung, or they did not find each other (7)
├── VerificationError         a merged model does not answer as base + adapter did (8)
└── InterruptedRun            the run was asked to stop and saved what it had (75: resume me)

Beside these exit codes: 0 done, 70 a bug in quantune, 130 aborted by a second Ctrl-C.

A message says what was expected, what was found and what to do. The command line prints it without a traceback unless
`--debug` is given; everything else that escapes is a bug in quantune.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

EXIT_FAILURE = 1
EXIT_INPUT = 2
EXIT_MISSING_BACKEND = 3
EXIT_NON_FINITE = 4
EXIT_CHECKPOINT = 5
EXIT_IN_USE = 6
EXIT_DIED = 7
EXIT_VERIFICATION = 8
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_ABORTED = 130  # as a shell has it for SIGINT
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: run it again


class QuantuneError(Exception):
    """An error with a sentence for the person who meets it."""

    exit_code = EXIT_FAILURE


class InputError(QuantuneError):
    """Something given to quantune can't be used."""

    exit_code = EXIT_INPUT


@attrs.frozen(kw_only=True)
class Place:
    """Another place that a problem is about."""

    line: int | None = None
    """Line in the file, from 1; None when the value did not come from a file."""
    column: int | None = None
    """Column in the line, from 1."""
    source_line: str | None = None
    """The text of that line."""
    underline: tuple[int, int] | None = None
    """Column and length, in characters, of what is meant; one character at `column` by default."""
    origin: str | None = None
    """The file, or `--set adapter.r=...`."""
    label: str = ""
    """What stands there, e.g. `and this says int8`."""


@attrs.frozen(kw_only=True)
class Problem:
    """One thing that is wrong with a recipe."""

    code: str
    """Stable code, e.g. `QT012`."""
    where: str
    """The key path in the recipe, e.g. `adapter.r` or `data.train[0].path`."""
    message: str
    """What was expected and what was found."""
    hint: str | None = None
    """What to do about it."""
    line: int | None = None
    """Line in the file, from 1; None when the value did not come from a file."""
    column: int | None = None
    """Column of the key in the line, from 1."""
    source_line: str | None = None
    """The text of that line."""
    underline: tuple[int, int] | None = None
    """Column and length, in characters, of the key or value that is wrong; one character at `column` by default."""
    origin: str | None = None
    """The file, or `--set adapter.r=...`."""
    related: tuple[Place, ...] = ()
    """Where else to look, e.g. at the key that this one contradicts."""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.origin, self.line, self.column) if part is not None)
        text = f"{place} [{self.where}] {self.message}  {self.code}".lstrip()
        return f"{text}\n  {self.hint}" if self.hint else text


class RecipeError(InputError):
    """One or more problems in a recipe, all reported at once."""

    def __init__(self, problems: Sequence[Problem], warnings: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        self.warnings = tuple(warnings)
        """What is understood beside them and should be written otherwise."""
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(InputError):
    """A data file or row that can't be used."""


class ModelError(InputError):
    """A base model or adapter that can't be used, or adapter targets that match nothing."""


class BackendError(InputError):
    """A backend that is unknown, lacks something, or was given options it does not have."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint
        """What to do about it, where that is known apart from the message."""


class MissingBackendError(BackendError):
    """A backend that can't run here."""

    exit_code = EXIT_MISSING_BACKEND


class RunFolderError(InputError):
    """A run folder that is finished, or not a run folder at all."""


class FolderInUseError(RunFolderError):
    """A run folder that another process uses."""

    exit_code = EXIT_IN_USE


class ResumeError(InputError):
    """A run that is resumed with another recipe, data or base than it was begun with."""


class QuantizationError(QuantuneError):
    """A weight that can't be packed, or that the recipe meant to pack and that is not packed."""


class NonFiniteError(QuantuneError):
    """A loss or gradient that is NaN or infinite; nothing was updated with it."""

    exit_code = EXIT_NON_FINITE


class CheckpointError(QuantuneError):
    """A checkpoint that is damaged, or that can't be written."""

    exit_code = EXIT_CHECKPOINT


class DistributedError(QuantuneError):
    """A process of the run died or hung, or the processes did not find each other."""

    exit_code = EXIT_DIED


class VerificationError(QuantuneError):
    """A merged model that does not answer as base + adapter did when they were trained."""

    exit_code = EXIT_VERIFICATION


class InterruptedRun(QuantuneError):
    """The run was asked to stop; everything up to the last step is saved."""

    exit_code = EXIT_RESUMABLE
