"""Files that a person asks for by name."""

from __future__ import annotations

from pathlib import Path

from quantune.errors import InputError


def write_output(path: Path, content: str, *, parents: bool = False) -> None:
    """Write a text file, in place of one that is there; with `parents` also the folders it is in.

    Raises:
        InputError: it can't be written; names it.
    """
    if path.is_dir():
        raise InputError(f"expected a file to write, found the folder {path}")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
