"""How a check fails: with a sentence for the author of the backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import pytest


def fail(message: str) -> NoReturn:
    """Fail the check with `message` alone: the kit's own lines would tell an author nothing."""
    pytest.fail(message, pytrace=False)


def require(holds: bool, message: str) -> None:
    """Fail the check unless it holds."""
    if not holds:
        fail(message)


@contextlib.contextmanager
def expecting_no_error(what: str, remedy: str = "") -> Iterator[None]:
    """Fail if the author's code raises, with what was being done and the traceback of the code."""
    try:
        yield
    except Exception as error:
        advice = f" {remedy}" if remedy else ""
        pytest.fail(f"{what} raised {type(error).__name__}: {error}.{advice}")
