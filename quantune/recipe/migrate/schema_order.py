"""The recipe's own order, defaults and values, read off its classes."""

from __future__ import annotations

import datetime
from typing import Any, get_args, get_type_hints

import attrs

from quantune.recipe.schema import Recipe, SourceConfig

NOTHING = object()
"""The default of a key that has none."""


def class_of(path: tuple[str | int, ...]) -> type | None:
    """The attrs class of the table at a path; None for a table of free keys."""
    if path[:1] == ("data",) and len(path) >= 2 and path[1] in ("train", "eval"):
        return SourceConfig if len(path) <= 3 else None
    found: type | None = Recipe
    for step in path:
        hints = get_type_hints(found) if found is not None and attrs.has(found) else {}
        annotation = hints.get(str(step))
        members: tuple[Any, ...] = (annotation, *get_args(annotation))
        found = next((one for one in members if attrs.has(one)), None)
    return found


def order_of(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the table at a path in the order of its class."""
    cls = class_of(path)
    return [] if cls is None else [field.name for field in attrs.fields(cls)]


def default_of(path: tuple[str | int, ...]) -> Any:
    """What quantune does where the key is absent; NOTHING where it has to be given."""
    cls = class_of(path[:-1])
    fields = {} if cls is None else {field.name: field for field in attrs.fields(cls)}
    if path[-1] not in fields:
        return NOTHING
    default = fields[str(path[-1])].default
    if default is attrs.NOTHING:
        return NOTHING
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # a class at run time
        default = default.factory()
    return list(default) if isinstance(default, tuple) else default


def is_plain(value: Any) -> bool:
    """Whether TOML can hold a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(member) for key, member in value.items())
    if isinstance(value, list):
        return all(is_plain(member) for member in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    return isinstance(value, str | float | bool | datetime.date)
