"""Checks of single values, as attrs validators that raise ValueError with a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def positive(instance: Any, attribute: Any, value: Any) -> None:
    """The value must be a number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"must be greater than 0, found {value}")


def finite(instance: Any, attribute: Any, value: Any) -> None:
    """The value must not be infinite or NaN."""
    if not math.isfinite(value):
        raise ValueError(f"must be finite, found {value}")


def positive_or_auto(instance: Any, attribute: Any, value: Any) -> None:
    """The value must be `auto` or a number greater than 0."""
    if value != "auto":
        positive(instance, attribute, value)


def at_least(minimum: float) -> Validator:
    """The value must be a number, `minimum` or greater."""

    def check(instance: Any, attribute: Any, value: Any) -> None:
        if math.isnan(value) or value < minimum:
            raise ValueError(f"must be at least {minimum:g}, found {value}")

    return check


def between(low: float, high: float, *, right_open: bool = False) -> Validator:
    """The value must be a number from `low` to `high`; with `right_open` less than `high`."""

    def check(instance: Any, attribute: Any, value: Any) -> None:
        inside = low <= value < high if right_open else low <= value <= high
        if not inside:
            upper = f"less than {high:g}" if right_open else f"at most {high:g}"
            raise ValueError(f"must be at least {low:g} and {upper}, found {value}")

    return check


def not_empty(instance: Any, attribute: Any, value: Any) -> None:
    """The value must hold something."""
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError("must not be empty")


def patterns(instance: Any, attribute: Any, value: Any) -> None:
    """A name or a list of names, none of them empty."""
    names = (value,) if isinstance(value, str) else value
    if any(not name.strip() for name in names):
        raise ValueError("must not hold an empty name")
