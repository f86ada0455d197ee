"""From the text of a YAML to a recipe and an account of every key: a pure function."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path as PathOnDisk
from typing import Any

import attrs

from quantune.errors import Problem
from quantune.recipe import conflicts
from quantune.recipe.load import OptionsOf, sound_sections, structure_recipe
from quantune.recipe.migrate import reading
from quantune.recipe.migrate.defaults import Default, defaults, lacks
from quantune.recipe.migrate.detect import NOT_YET, kind_of
from quantune.recipe.migrate.quantization import named_alone
from quantune.recipe.migrate.reading import Path, Position, key_text
from quantune.recipe.migrate.report import Entry, Report
from quantune.recipe.migrate.rule import Config, Leaf, Outcome, RecipePath, refuse, same
from quantune.recipe.migrate.schema_order import default_of, is_plain
from quantune.recipe.migrate.table import CONTAINERS, pattern, rule_for, suggestion, takes_a_value
from quantune.recipe.migrate.values import Unusable
from quantune.recipe.migrate.writing import Line, to_toml
from quantune.recipe.structure import Finding

ALWAYS = frozenset(
    {
        ("model", "base"),
        ("quantization", "backend"),
        ("quantization", "weight_dtype"),
        ("quantization", "experts"),
        ("adapter", "type"),
        ("adapter", "r"),
        ("adapter", "alpha"),
        ("adapter", "targets"),
        ("data", "max_length"),
        ("training", "max_steps"),
        ("training", "epochs"),
        ("training", "batch_size"),
        ("training", "micro_batch_size"),
        ("training", "learning_rate"),
        ("training", "schedule"),
        ("training", "optimizer"),
        ("training", "warmup_ratio"),
        ("training", "warmup_steps"),
    }
)
"""Keys that are written even where they say what quantune does anyway: what a reader of a recipe looks for first."""
MOST_SUGGESTIONS = 300
"""With more unknown keys than that nothing was meant, and looking for what was would take minutes."""


@attrs.frozen(kw_only=True)
class Migration:
    """A YAML as a recipe, as far as it can be one."""

    report: Report
    """What became of every key."""
    document: dict[str, Any] | None = None
    """The recipe as nested tables; None where the YAML can't be read or is another tool's."""
    recipe: str | None = None
    """The recipe as commented TOML, likewise. When the report isn't ok, it is what can be said of it all the same, with
    what can't at its head."""


@attrs.frozen(kw_only=True)
class _Decided:
    """A key with its outcome."""

    path: Path
    value: Any
    outcome: Outcome


def migrate(
    text: str, name: str = "old.yaml", processes: int = 1, *, options_of: OptionsOf, folder: PathOnDisk | None = None
) -> Migration:
    """Translate an axolotl-style YAML.

    Args:
        text: the YAML.
        name: what the report and the recipe call it.
        processes: in how many processes it was run: batches there are counted for each of them.
        options_of: the attrs class of a backend's options.
        folder: where the recipe will stand, which its paths are relative to; None for the current directory, which
            those of the YAML are relative to.
    """
    try:
        document = reading.read(text)
    except reading.Unreadable as error:
        return unreadable(name, error.message, text=text, position=error.position)
    kind = kind_of(document.values)
    problems = list(_duplicates(document, name, text))
    if kind != "axolotl":
        note = NOT_YET[kind]
        entries = _entries([_Decided(path=p, value=v, outcome=refuse(note)) for p, v in _leaves(document)], document)
        problems.append(
            _problem("QT205", "yaml", note, "write a recipe; quantune init begins one", name=name, text=text)
        )
        return Migration(report=Report(name=name, kind=kind, entries=entries, problems=tuple(problems)))
    config = Config(values=document.values, processes=processes, folder=folder)
    decided = _without_contradictions(_decide(document, config))
    decided, left = _checked(decided, config, options_of)
    places = {key_text(path): place for path, place in document.positions.items()}
    for lack in lacks(config):
        place = _nearest(lack.key, places)
        problems.append(_problem("QT204", lack.key, lack.message, lack.hint, name=name, text=text, position=place))
    if not problems and not any(one.outcome.what in ("refused", "unrecognised") for one in decided):
        problems += [_problem(f.code, f.where, f.message, f.hint, name=name, text=text) for f in left]
    added = list(defaults(config, _written(decided)))
    decided = [_without_defaults(one) for one in decided]
    report = Report(name=name, kind=kind, entries=_entries(decided, document), problems=tuple(problems))
    made = _document(decided, added)
    lines = _lines(decided, added)
    return Migration(report=report, document=made, recipe=to_toml(made, lines, report))


def unreadable(name: str, message: str, *, text: str = "", position: Position | None = None) -> Migration:
    """What comes of a file that holds no YAML, or none that can be read."""
    problem = _problem("QT200", "yaml", message, name=name, text=text, position=position)
    return Migration(report=Report(name=name, kind="unreadable", problems=(problem,)))


def _leaves(document: reading.Document) -> list[tuple[Path, Any]]:
    return list(reading.leaves(document.values))


def _decide(document: reading.Document, config: Config) -> list[_Decided]:
    """What becomes of every key by its rule."""
    decided = [_Decided(path=p, value=v, outcome=_outcome(p, v, config)) for p, v in _leaves(document)]
    if sum(one.outcome.what == "unrecognised" for one in decided) > MOST_SUGGESTIONS:
        return decided
    return [
        attrs.evolve(one, outcome=_suggesting(one)) if one.outcome.what == "unrecognised" else one for one in decided
    ]


def _suggesting(one: _Decided) -> Outcome:
    meant = suggestion(one.path)
    return attrs.evolve(one.outcome, note=f'did you mean "{meant}"?' if meant else None)


def _outcome(path: Path, value: Any, config: Config) -> Outcome:
    rule = rule_for(path)
    empty = value is None or value in ({}, [])
    if rule is None and pattern(path) in CONTAINERS:
        return same() if empty else refuse("expected keys or a list of them under it, found a single value")
    if rule is None and takes_a_value(path):
        return refuse(f"expected a value under {path[0]}, found keys")
    if rule is None:
        return Outcome(what="unrecognised")
    if value is None and not named_alone(path, config):
        return same()
    try:
        outcome = rule.apply(Leaf(path=path, value=value, config=config))
    except Unusable as error:
        return refuse(str(error))
    for _, written in outcome.writes:
        if not is_plain(written):
            return refuse("expected text, numbers, booleans, lists and tables of them, found what TOML can't hold")
    return outcome


def _without_contradictions(decided: list[_Decided]) -> list[_Decided]:
    """Refuse keys that write different things to the same place, naming each other."""
    said: dict[RecipePath, list[tuple[_Decided, Any]]] = {}
    for one in decided:
        for path, value in one.outcome.writes:
            said.setdefault(path, []).append((one, value))
    against: dict[Path, set[str]] = {}
    for entries in said.values():
        if any(not _equal(value, entries[0][1]) for _, value in entries):
            for one, value in entries:
                others = {key_text(other.path) for other, held in entries if not _equal(held, value)}
                against.setdefault(one.path, set()).update(others)
    return [
        attrs.evolve(one, outcome=refuse(f"{', '.join(sorted(against[one.path]))} says something else; remove one"))
        if one.path in against
        else one
        for one in decided
    ]


def _equal(one: Any, other: Any) -> bool:
    return one is other or bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _checked(decided: list[_Decided], config: Config, options_of: OptionsOf) -> tuple[list[_Decided], list[Finding]]:
    """Refuse every key whose value a recipe does not take, until what is left is right.

    Returns what was decided, and the findings that no key of the YAML is to blame for.
    """
    while True:
        document = _document(decided, list(defaults(config, _written(decided))))
        findings = _findings(document, options_of)
        writers: dict[RecipePath, list[_Decided]] = {}
        for one in decided:
            for path, _ in one.outcome.writes:
                writers.setdefault(path, []).append(one)
        blamed: dict[Path, Finding] = {}
        for finding in findings:
            for length in range(1, len(finding.path) + 1):
                for one in writers.get(finding.path[:length], ()):
                    blamed.setdefault(one.path, finding)
        if not blamed:
            return decided, findings
        decided = [
            attrs.evolve(one, outcome=refuse(_in_words(blamed[one.path]))) if one.path in blamed else one
            for one in decided
        ]


def _findings(document: dict[str, Any], options_of: OptionsOf) -> list[Finding]:
    _, findings = structure_recipe(document, options_of)
    return findings + list(conflicts.check_sections(sound_sections(document, findings)))


def _in_words(finding: Finding) -> str:
    text = f"{finding.where}: {finding.message}"
    return f"{text}; {finding.hint}" if finding.hint else text


def _without_defaults(one: _Decided) -> _Decided:
    """A key that only says what quantune does anyway is a default, unless a reader would look for it."""
    writes = one.outcome.writes
    usual = all(path not in ALWAYS and _equal(value, default_of(path)) for path, value in writes)
    if not writes or not usual or one.outcome.changed:
        return one
    return attrs.evolve(one, outcome=same(one.outcome.note))


def _written(decided: Iterable[_Decided]) -> set[RecipePath]:
    return {path for one in decided for path, _ in one.outcome.writes}


def _document(decided: Iterable[_Decided], added: Iterable[Default]) -> dict[str, Any]:
    """The recipe as nested tables, those that it always has included."""
    document: dict[str, Any] = {"model": {}, "adapter": {}, "data": {}}
    for path, value in [
        *((p, v) for one in decided for p, v in one.outcome.writes),
        *((d.path, d.value) for d in added),
    ]:
        _put(document, path, value)
    for part in ("train", "eval"):
        sources = document["data"].get(part)
        if sources is not None:
            document["data"][part] = [sources[index] for index in sorted(sources)]
    return document


def _put(document: dict[Any, Any], path: RecipePath, value: Any) -> None:
    """Set a key; the sources of the data are kept by index until all are there."""
    for step in path[:-1]:
        document = document.setdefault(step, {})
    document[path[-1]] = value


def _lines(decided: Iterable[_Decided], added: Iterable[Default]) -> dict[RecipePath, Line]:
    """What the recipe says about each of its keys: what it was called, and what is to be known about it."""
    lines: dict[RecipePath, Line] = {default.path: Line(said=default.note) for default in added}
    for one in decided:
        for path, value in one.outcome.writes:
            line = lines.get(path, Line())
            note = (one.outcome.note,) if one.outcome.note and path == one.outcome.writes[0][0] else ()
            lines[path] = Line(keys=(*line.keys, one.path), notes=(*line.notes, *note), value=value)
    return lines


def _entries(decided: Iterable[_Decided], document: reading.Document) -> tuple[Entry, ...]:
    entries = []
    for one in decided:
        line, column = document.positions[one.path]
        entries.append(
            Entry(
                key=key_text(one.path),
                outcome=one.outcome.what,
                value=one.value,
                line=line,
                column=column,
                to=tuple(Finding(code="", path=path, message="").where for path, _ in one.outcome.writes),
                note=one.outcome.note,
                changed=one.outcome.changed,
            )
        )
    return tuple(sorted(entries, key=lambda entry: (entry.line, entry.column, entry.key)))


def _nearest(key: str, places: dict[str, Position]) -> Position | None:
    """Where a key stands, or the longest beginning of it that is there."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key)


def _duplicates(document: reading.Document, name: str, text: str) -> Iterable[Problem]:
    for path, first, second in document.duplicates:
        twice = f"twice in line {first[0]}" if first[0] == second[0] else f"in lines {first[0]} and {second[0]}"
        message = f"{key_text(path)} stands {twice}"
        hint = "YAML takes the last one; remove one of them"
        yield _problem("QT201", key_text(path), message, hint, name=name, text=text, position=second)


def _problem(
    code: str,
    where: str,
    message: str,
    hint: str | None = None,
    *,
    name: str,
    text: str,
    position: Position | None = None,
) -> Problem:
    line, column = position or (None, None)
    lines = _lines_of(text)
    source = lines[line - 1] if line is not None and line <= len(lines) else None
    key = where.rpartition(".")[2]
    spelled_out = source is not None and column is not None and source[column - 1 :].startswith(key)
    return Problem(
        code=code,
        where=where,
        message=message,
        hint=hint,
        line=line,
        column=column,
        source_line=source,
        underline=(column, len(key)) if spelled_out and column is not None else None,
        origin=name,
    )


@lru_cache(maxsize=1)
def _lines_of(text: str) -> list[str]:
    return text.splitlines()
