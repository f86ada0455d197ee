"""Matching module names against the patterns of a recipe's `skip`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from transformers.quantizers.quantizers_utils import should_convert_module


class KeptPattern(str):
    """A pattern by which a checkpoint says what it keeps in full precision: as in `skip`, or as transformers reads it,
    for which it may be a regular expression."""


def matches(name: str, pattern: str) -> bool:
    """Whether the parts of `pattern` occur one after the other in the dotted `name`; `*` matches within a part.

    >>> matches("model.layers.0.mlp.down_proj", "layers.0")
    True
    >>> matches("model.layers.10.mlp.down_proj", "layers.1")
    False
    """
    if isinstance(pattern, KeptPattern) and not should_convert_module(name, [str(pattern)]):
        return True
    parts, wanted = name.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(fnmatchcase(parts[start + i], part) for i, part in enumerate(wanted)) for start in starts)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of `patterns` matches `name`."""
    return any(matches(name, pattern) for pattern in patterns)
