"""What an unknown key of a recipe may be: one of another section, one of an older tool, one of another method."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import attrs

from quantune.recipe import legacy
from quantune.recipe.legacy.foreign import FOREIGN
from quantune.recipe.legacy.reading import KEYS
from quantune.recipe.positions import Path
from quantune.recipe.schema import QatConfig, Recipe, SourceConfig, SpecialTokensConfig
from quantune.recipe.structure import Finding

_RECIPE_KEY = re.compile(r"`(\w+)\.([^`]*)`")


def explain_unknown(finding: Finding, document: dict[str, Any]) -> Finding:
    """The finding; where it is an unknown key of `document`, with what the key may be."""
    if finding.code not in ("QT011", "QT012") or not (finding.hint or "").startswith(("there are:", "did you mean")):
        return finding
    key, value = str(finding.path[-1]), _at(document, finding.path)
    alone = len(finding.path) == 1 and not _is_table(value)
    known = (
        _of_an_older_tool(key, value, near=len(finding.path) == 1)
        or (_of_a_migrated_config(f"datasets[].{key}") if finding.path[0] == "data" else None)
        or _of_another_section(key)
        or _of_a_migrated_config(key)
        or (_like_one_of_a_section(key) if alone else None)
    )
    if alone:  # at the top stand tables, and this is none
        message = finding.message.replace("unknown section", "unknown key")
        return attrs.evolve(finding, message=message, hint=known or "a key stands under the header of its section")
    return finding if known is None else attrs.evolve(finding, hint=known)


def explain_optimizer(finding: Finding, document: dict[str, Any]) -> Finding:
    """The finding; where it is another tool's name of an optimizer, with quantune's."""
    if finding.code != "QT013" or finding.path != ("training", "optimizer"):
        return finding
    from quantune.recipe.migrate.training import OPTIMIZERS  # on the error path only: it reads YAML

    value = document["training"]["optimizer"]
    name, difference = OPTIMIZERS.get(value, (None, None)) if isinstance(value, str) else (None, None)
    if name is None:
        return finding
    return attrs.evolve(finding, hint=f'write "{name}"' + (f": {difference}" if difference else ""))


def _at(document: Any, path: Path) -> Any:
    for part in path:
        document = document[part]
    return document


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value))


def _of_an_older_tool(key: str, value: Any, *, near: bool) -> str | None:
    """How to write an older spelling of the quantization that stands where none is understood, or is misspelt."""
    if key in FOREIGN:
        return FOREIGN[key].way_out
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8) if near or key in KEYS else []
    if not close:
        return None
    name = close[0]
    made = legacy.rewrite({name: value})
    now = made.warnings[0].hint if made.warnings and not made.findings else "write [quantization] backend = ..."
    return now if name == key else f'did you mean "{name}"? {now}'


def _sections() -> Iterator[tuple[str, Sequence[str]]]:
    """Headers as a recipe has them, each with its keys."""
    for name, annotation in get_type_hints(Recipe).items():
        cls = next(one for one in (annotation, *getattr(annotation, "__args__", ())) if attrs.has(one))
        yield f"[{name}]", [field.name for field in attrs.fields(cls) if field.name != "options"]
    yield "[[data.train]]", [field.name for field in attrs.fields(SourceConfig)]
    yield "[model.special_tokens]", [field.name for field in attrs.fields(SpecialTokensConfig)]
    yield "[training.qat]", [field.name for field in attrs.fields(QatConfig)]


def _of_another_section(key: str) -> str | None:
    owners = [header for header, keys in _sections() if key in keys]
    return f"it belongs in {' or '.join(owners)}" if owners else None


def _like_one_of_a_section(key: str) -> str | None:
    owner_of = {name: header for header, keys in _sections() for name in keys}
    close = difflib.get_close_matches(key, owner_of, n=1, cutoff=0.75)
    return f"did you mean {owner_of[close[0]]} {close[0]}?" if close else None


def _of_a_migrated_config(key: str) -> str | None:
    """What `migrate` makes of a key of that name."""
    from quantune.recipe.migrate.table import BY_KEY, MEANT  # on the error path only: it reads YAML

    rule = BY_KEY.get(MEANT.get(key, key))
    if rule is None or key in KEYS:
        return None
    meaning = _RECIPE_KEY.sub(r"[\1] \2", rule.meaning).replace("`", "")
    if rule.treatment == "refuse":
        return f"quantune has nothing for it: {meaning}"
    if rule.treatment == "drop" or meaning.startswith(("nothing", "what quantune does")):
        return f"leave it out: {meaning.removeprefix('nothing: ')}"
    return f"write {meaning}"
