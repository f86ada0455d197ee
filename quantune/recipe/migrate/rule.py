"""What a rule of `migrate` is: the keys it covers, and a function from a key's value to what becomes of it.

Rules see the whole document and change nothing, so that neither their order nor that of the keys matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path as PathOnDisk
from typing import Any, Literal

import attrs

from quantune.recipe.migrate.reading import Path, key_text
from quantune.recipe.migrate.report import What
from quantune.recipe.migrate.values import Unusable, flag, is_off, number, text, whole
from quantune.recipe.starter import path_in

RecipePath = tuple[str | int, ...]
"""A key of the recipe, e.g. `("data", "train", 0, "path")`."""


MOVED = "relative to the recipe's folder; it was relative to the current directory there"


@attrs.frozen(kw_only=True)
class Outcome:
    """What becomes of one key."""

    what: What
    """As in the report."""
    writes: tuple[tuple[RecipePath, Any], ...] = ()
    """Keys of the recipe with their values."""
    note: str | None = None
    """Why, or what changed."""
    changed: bool = False
    """Whether the meaning is not exactly the same."""


def write(path: str | RecipePath, value: Any, note: str | None = None, *, changed: bool = False) -> Outcome:
    """The recipe's key `path` says it."""
    return writes({path: value}, note, changed=changed)


def writes(values: Mapping[Any, Any], note: str | None = None, *, changed: bool = False) -> Outcome:
    """Several keys of the recipe say it together."""
    made = tuple((tuple(path.split(".")) if isinstance(path, str) else path, value) for path, value in values.items())
    return Outcome(what="translated", writes=made, note=note, changed=changed)


def same(note: str | None = None) -> Outcome:
    """It says what quantune does anyway."""
    return Outcome(what="default", note=note)


def drop(reason: str) -> Outcome:
    """It has no place in a recipe, and nothing is lost."""
    return Outcome(what="dropped", note=reason)


def refuse(reason: str) -> Outcome:
    """Quantune can't do it."""
    return Outcome(what="refused", note=reason)


@attrs.frozen(kw_only=True, eq=False)
class Config:
    """The whole document as the rules look at it; a value of the wrong kind counts as absent, its own rule says so.

    Two of them are never equal, so that what follows from one can be remembered by it.
    """

    values: Mapping[Any, Any]
    """The document."""
    processes: int = 1
    """How many processes it was run in."""
    folder: PathOnDisk | None = None
    """Where the recipe will stand, which its paths are relative to; None for the current directory, as those of the
    YAML are."""

    def get(self, key: str) -> Any:
        """The value as it is, None where it is absent."""
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> Any:
        """The value as a number."""
        return _or(number, self.get(key), default)

    def whole(self, key: str, default: int | None = None) -> Any:
        """The value as a whole number."""
        return _or(whole, self.get(key), default)

    def path(self, given: str) -> str:
        """A path of what is read, as the recipe names it."""
        if self.folder is None or given.startswith(("/", "~")):
            return given
        return path_in(self.folder / "recipe.toml", PathOnDisk(given))

    def flag(self, key: str) -> bool:
        """Whether the value is on."""
        return bool(_or(flag, self.get(key), False))

    def given(self, key: str) -> bool:
        """Whether the key says something: neither absent, null, false, 0 nor empty."""
        return not is_off(self.get(key))


def _or(convert: Callable[[Any], Any], value: Any, default: Any) -> Any:
    try:
        return default if value is None else convert(value)
    except Unusable:
        return default


@attrs.frozen(kw_only=True)
class Leaf:
    """One key of the document, as its rule sees it."""

    path: Path
    """Where it stands."""
    value: Any
    """Its value, never null."""
    config: Config
    """The document around it."""

    @property
    def key(self) -> str:
        """The path as the report writes it."""
        return key_text(self.path)

    @property
    def name(self) -> str:
        """The last key of the path."""
        return str(self.path[-1])


@attrs.frozen(kw_only=True)
class Rule:
    """The treatment of one key, or of several that are treated alike."""

    keys: tuple[str, ...]
    """What it covers: `learning_rate`, `datasets[].path`; `special_tokens.*` covers any one key, `x.**` all below."""
    treatment: Literal["translate", "drop", "refuse"]
    """What becomes of it where it says something that quantune does not do anyway."""
    meaning: str
    """For the documentation: the recipe's key, or the reason."""
    apply: Callable[[Leaf], Outcome]
    """What becomes of a value that is not null; raises Unusable for one of the wrong kind."""


def translate(*keys: str, to: str, by: Callable[[Leaf], Outcome]) -> Rule:
    """A rule for keys that the recipe's `to` says."""
    return Rule(keys=keys, treatment="translate", meaning=to, apply=by)


def value(key: str, to: str, convert: Callable[[Any], Any]) -> Rule:
    """A rule for a key whose value the recipe's `to` takes as it is."""
    return translate(key, to=f"`{to}`", by=lambda leaf: write(to, convert(leaf.value)))


def path_value(key: str, to: str, is_path: Callable[[str], bool] = lambda name: True) -> Rule:
    """A rule for a key that names something to read, by its path where `is_path` says so."""
    return translate(key, to=f"`{to}`", by=lambda leaf: write_path(leaf, to, text(leaf.value), is_path))


def write_path(
    leaf: Leaf, to: str | RecipePath, name: str, is_path: Callable[[str], bool] = lambda name: True
) -> Outcome:
    """The recipe's key `to` names what is read."""
    path = leaf.config.path(name) if is_path(name) else name
    return write(to, path, None if path == name else MOVED)


def dropped(*keys: str, because: str) -> Rule:
    """A rule for keys that a recipe needs none of."""
    return Rule(keys=keys, treatment="drop", meaning=because, apply=lambda leaf: drop(because))


def refused(*keys: str, because: str) -> Rule:
    """A rule for keys that quantune has nothing for, unless they are off."""

    def apply(leaf: Leaf) -> Outcome:
        return same() if is_off(leaf.value) else refuse(because)

    return Rule(keys=keys, treatment="refuse", meaning=because, apply=apply)
