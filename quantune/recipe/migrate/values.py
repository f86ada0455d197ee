"""Values of YAML taken for what the key they stand under means: `2e-5` and `"16"` are numbers there."""

from __future__ import annotations

import math
import re
from typing import Any

from quantune.recipe.structure import describe

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?\d{1,18}")


class Unusable(ValueError):
    """A value is not of the kind that its key takes; a sentence."""


def number(value: Any) -> int | float:
    """A finite number, also written as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise Unusable("expected a number, found one of more than 64 bits")
        return value
    if isinstance(value, str):
        if _WHOLE.fullmatch(value.strip()):
            return int(value)
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise Unusable(f"expected a number, found {describe(value)}")


def whole(value: Any) -> int:
    """A whole number, also written as text or as `4.0`."""
    try:
        found = number(value)
    except Unusable:
        found = math.nan
    if not float(found).is_integer() or abs(found) >= 2**63:
        raise Unusable(f"expected a whole number, found {describe(value)}")
    return int(found)


def flag(value: Any) -> bool:
    """True or false, also written as text or as 0 and 1."""
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise Unusable(f"expected true or false, found {describe(value)}")


def text(value: Any) -> str:
    """Text that is not empty; a whole number is one, as a revision may be."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(number(value))
    if isinstance(value, str) and value.strip():
        return value
    raise Unusable(f"expected text, found {describe(value)}")


def names(value: Any) -> list[str]:
    """A list of names; a single one is a list of one."""
    if isinstance(value, list) and value:
        return [text(member) for member in value]
    return [text(value)]


def is_off(value: Any) -> bool:
    """Whether a value switches off or says nothing: null, false, 0, nothing, also as text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "false", "no", "off", "none", "null", "0")
    return value is None or value is False or value == 0 or value in ([], {})
