"""Misspelt keys and values read as what they probably mean, so that they hide no further mistake of their section."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding


@attrs.frozen(kw_only=True)
class Mended:
    """A document without its unknown keys."""

    document: dict[str, Any]
    guessed: tuple[Path, ...]
    """Keys of it whose name or value is a guess."""
    unread: tuple[Finding, ...]
    """The findings about what can't be read as anything."""

    def sure(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings that are not about a guess, of which it is known already that it is wrong."""
        return [one for one in findings if not any(one.path[: len(path)] == path for path in self.guessed)]


def mend(document: dict[str, Any], findings: Iterable[Finding]) -> Mended:
    """Read what is misspelt within sections; the document that is given stays as it is."""
    guessed: list[Path] = []
    unread = []
    for finding in findings:
        *tables, key = finding.path
        unknown = finding.code == "QT012"
        if not tables or not (unknown or finding.meant):
            unread.append(finding)
            continue
        table = copy.copy(_at(document, tables))
        if not unknown:
            table[key] = finding.meant
            guessed.append(finding.path)
        else:
            value = table.pop(key)
            if finding.meant is not None and finding.meant not in table:
                table[finding.meant] = value
                guessed.append((*tables, finding.meant))
        document = _replaced(document, tables, table)
    return Mended(document=document, guessed=tuple(guessed), unread=tuple(unread))


def _at(document: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        document = document[part]
    return document


def _replaced(document: Any, path: Sequence[str | int], value: Any) -> Any:
    if not path:
        return value
    replaced = copy.copy(document)
    replaced[path[0]] = _replaced(document[path[0]], path[1:], value)
    return replaced
