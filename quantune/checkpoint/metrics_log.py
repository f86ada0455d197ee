"""The rows a run writes as it goes: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from quantune.checkpoint.commit import sync_file, write_file_atomically
from quantune.errors import QuantuneError, RunFolderError


@attrs.frozen
class MetricsLog:
    """One JSON object a line; each has a `step`."""

    path: Path

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is with the system, if not on the disk, when this returns.

        Raises:
            QuantuneError: the file can't be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise QuantuneError(
                f"{self.path} can't be written: {error.strerror}. What is saved is untouched; put that right and resume"
            ) from error

    def flush(self) -> None:
        """Put what was added on the disk: a checkpoint must not outlive the rows of its steps."""
        if self.path.exists():
            sync_file(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line that a dying process left half-written is no row.

        Raises:
            RunFolderError: another line is not a JSON object with a `step`.
        """
        if not self.path.exists():
            return []
        *lines, _torn = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._row(number, line) for number, line in enumerate(lines, start=1)]

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps and a torn last line: the resumed run writes them again.

        Raises:
            RunFolderError: see `rows`.
        """
        kept = [row for row in self.rows() if row["step"] <= step]
        write_file_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{self.path}:{number}: expected a JSON object with a step, found {line[:60]!r}; remove that line"
            ) from error
        return row
