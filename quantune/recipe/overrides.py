"""`--set section.key=value`: changing a parsed recipe from the command line."""

from __future__ import annotations

import re
from typing import Any

import tomli

from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding, quoted

_KEY_PATH = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+|\[[0-9]+\])*")
_PART = re.compile(r"[A-Za-z0-9_-]+")
_PAIRS = (
    (("training", "epochs"), ("training", "max_steps")),
    (("training", "warmup_ratio"), ("training", "warmup_steps")),
    (("evaluation", "every_steps"), ("evaluation", "per_epoch")),
    (("checkpoint", "every_steps"), ("checkpoint", "per_epoch")),
)
IN_PLACE_OF: dict[Path, Path] = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
"""Keys of which a recipe has one or the other: an override of one takes the place of the other in the file."""


def parse_path(text: str) -> Path | None:
    """A key path from how people write it, `data.train[0].path` or `data.train.0.path`; None when it is none."""
    if not _KEY_PATH.fullmatch(text):
        return None
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in _PART.findall(text))


def apply_override(document: dict[str, Any], override: str, origins: dict[Path, str]) -> list[Finding]:
    """Apply one override to the document in place and note in `origins` what it set.

    Of two keys that say the same (`IN_PLACE_OF`), it removes the other, unless an override set that as well.
    """
    origin = f"--set {override}"
    name, equals, value = override.partition("=")
    path = parse_path(name.strip())
    if not equals or path is None or len(path) < 2:
        message = f'expected section.key=value, found "{override}"'
        hint = "for example training.max_steps=50 or data.train[0].limit=100"
        return [Finding(code="QT003", path=("--set",), message=message, hint=hint, origin=origin)]
    node: Any = document
    for part, following in zip(path, path[1:], strict=False):
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict) and isinstance(part, str) and (part in node or isinstance(following, str)):
            node = node.setdefault(part, {})
        else:
            node = None
    key: Any = path[-1]
    in_list = isinstance(node, list) and isinstance(key, int) and key < len(node)
    if not in_list and not (isinstance(node, dict) and isinstance(key, str)):
        message = f'"{name.strip()}" is no place in this recipe'
        return [Finding(code="QT003", path=path, message=message, origin=origin)]
    try:
        node[key] = toml_value(value.strip())
    except ValueError:
        message = f"expected a TOML value, found {quoted(value.strip())}"
        return [Finding(code="QT003", path=path, message=message, hint="close every bracket and quote", origin=origin)]
    origins[path] = origin
    other = IN_PLACE_OF.get(path)
    if other is not None and other not in origins:
        node.pop(other[-1], None)
    return []


def toml_value(text: str) -> Any:
    """The text as a TOML value; what is none, or says more than one, is a string.

    Raises:
        ValueError: it begins as a list, a table or a quoted string, and is none.
    """
    try:
        document = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):  # besides TOML's own errors: too many digits, nesting too deep
        document = {}
    if len(document) == 1:
        return document["value"]
    if text.startswith(("[", "{", '"', "'")):
        raise ValueError("no TOML value")
    return text
