"""The keys of a YAML document, counted independently of `quantune.recipe.migrate`."""

from __future__ import annotations

from collections import deque
from typing import Any

import yaml


def keys_of(document: dict[Any, Any]) -> list[str]:
    """The path of every leaf, sorted.

    A leaf is what is neither a mapping nor a list, an empty mapping or list, or a list in which, however deep, no
    mapping stands. Lists that hold mappings are walked by index.
    """
    found: list[str] = []
    waiting: deque[tuple[str, Any]] = deque((str(key), value) for key, value in document.items())
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, dict) and value:
            waiting.extend((f"{path}.{key}", member) for key, member in value.items())
        elif isinstance(value, list) and mappings_in(value):
            waiting.extend((f"{path}[{index}]", member) for index, member in enumerate(value))
        else:
            found.append(path)
    return sorted(found)


def mappings_in(value: Any) -> int:
    """How many mappings a list holds, in lists of lists too."""
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            count += 1
        elif isinstance(one, list):
            waiting.extend(one)
    return count


def loaded(text: str) -> dict[Any, Any]:
    """The document as PyYAML itself reads it."""
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found
