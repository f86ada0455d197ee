"""Checks of single values, as attrs validators that raise ValueError with a sentence.

A boolean is no number, and NaN is in no range. Each validator says in JSON Schema what it accepts, in an attribute
`json_schema`; a keyword there restricts values of the types it is about, and says nothing of others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def accepts(**keywords: Any) -> Callable[[Validator], Validator]:
    """Note on a validator what it accepts, as keywords of JSON Schema."""

    def note(validator: Validator) -> Validator:
        validator.json_schema = keywords  # type: ignore[attr-defined]  # functions have attributes
        return validator

    return note


@accepts(exclusiveMinimum=0)
def positive(instance: Any, attribute: Any, value: Any) -> None:
    """The value must be a number greater than 0; `inf` is one."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"must be greater than 0, found {_shown(value)}")


@accepts(minimum=-sys.float_info.max, maximum=sys.float_info.max)
def finite(instance: Any, attribute: Any, value: Any) -> None:
    """The value must not be infinite or NaN."""
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"must be finite, found {_shown(value)}")


@accepts(exclusiveMinimum=0)
def positive_or_auto(instance: Any, attribute: Any, value: Any) -> None:
    """The value must be `auto` or a number greater than 0."""
    if value != "auto":
        positive(instance, attribute, value)


@accepts(exclusiveMinimum=0, anyOf=[{"type": "integer"}, {"exclusiveMaximum": 1}])
def count_or_fraction(instance: Any, attribute: Any, value: Any) -> None:
    """The value must be a whole number greater than 0, or a fraction between 0 and 1."""
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"must be a whole number of samples or a fraction between 0 and 1, found {_shown(value)}")
    if not isinstance(value, float):
        positive(instance, attribute, value)


def at_least(minimum: float) -> Validator:
    """The value must be a number, `minimum` or greater."""

    @accepts(minimum=minimum)
    def check(instance: Any, attribute: Any, value: Any) -> None:
        if not _is_number(value) or not value >= minimum:
            raise ValueError(f"must be at least {minimum:g}, found {_shown(value)}")

    return check


def between(low: float, high: float, *, right_open: bool = False) -> Validator:
    """The value must be a number from `low` to `high`; with `right_open` less than `high`."""

    @accepts(**{"minimum": low, "exclusiveMaximum" if right_open else "maximum": high})
    def check(instance: Any, attribute: Any, value: Any) -> None:
        inside = _is_number(value) and (low <= value < high if right_open else low <= value <= high)
        if not inside:
            upper = f"less than {high:g}" if right_open else f"at most {high:g}"
            raise ValueError(f"must be at least {low:g} and {upper}, found {_shown(value)}")

    return check


@accepts(pattern=r"\S", minItems=1)
def not_empty(instance: Any, attribute: Any, value: Any) -> None:
    """The value must hold something."""
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError("must not be empty")


@accepts(pattern=r"\S", items={"pattern": r"\S"})
def patterns(instance: Any, attribute: Any, value: Any) -> None:
    """A name or a list of names, none of them empty."""
    names = (value,) if isinstance(value, str) else value
    if any(not name.strip() for name in names):
        raise ValueError("must not hold an empty name")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
