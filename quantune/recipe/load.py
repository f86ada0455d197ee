"""From the text of a recipe to a `Recipe`, or to every problem it has at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import attrs
import tomli

from quantune.errors import BackendError, Place, Problem, RecipeError
from quantune.recipe import conflicts, legacy, positions
from quantune.recipe.mending import mend
from quantune.recipe.overrides import apply_override, parse_path
from quantune.recipe.schema import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    QuantizationConfig,
    Recipe,
    SourceConfig,
)
from quantune.recipe.structure import Finding, structure
from quantune.recipe.syntax import toml_problem
from quantune.recipe.unknown import explain_optimizer, explain_unknown

OptionsOf = Callable[[str], type]
FileCheck = Callable[[Recipe, Collection[str]], Iterable[Finding]]
"""Given a recipe and the names of its sections that are sound."""
UNDERSTOOD = ("QT012", "QT013", "QT014", "QT015")
"""Codes that say of a key or value that it is none; what it contradicts is then unknown."""
OF_VALUES = ("QT013", "QT014", "QT015", "QT030")
"""Codes that say what is wrong with a value; of other codes the key is what they are about."""


class BackendsWith(Protocol):
    """Says which backends have an option called `key`, and, where given, the weight dtype `value`."""

    def __call__(self, key: str, value: str | None = None) -> Sequence[str]: ...


def _no_files(recipe: Recipe, sound: Collection[str]) -> Iterable[Finding]:
    return ()


def _no_backends(key: str, value: str | None = None) -> Sequence[str]:
    return ()


@attrs.frozen(kw_only=True)
class LoadedRecipe:
    """A recipe with the text it came from, so that whatever is found later can point into it."""

    recipe: Recipe
    path: Path
    """As given."""
    text: str
    origins: dict[positions.Path, str] = attrs.field(factory=dict)
    """What `--set` set, by key path."""
    rewritten: legacy.Rewritten = attrs.field(factory=lambda: legacy.Rewritten(document={}))
    """What older spellings in it were rewritten to."""
    warnings: tuple[Problem, ...] = ()
    """Deprecated spellings, each with how to write it now."""

    def problem(self, code: str, where: str, message: str, hint: str | None = None) -> Problem:
        """One problem at `where` (`data.train[0].path`), with its position."""
        path = parse_path(where) or (where,)
        finding = Finding(code=code, path=self.rewritten.source(path), message=message, hint=hint)
        return _locate(finding, self.text, self.path, self.origins)

    def error(self, findings: Iterable[Finding]) -> RecipeError:
        """The findings as one error with positions."""
        return RecipeError(_located(self.rewritten.placed(findings), self.text, self.path, self.origins))


def load_recipe(
    path: Path,
    *,
    options_of: OptionsOf,
    backends_with: BackendsWith = _no_backends,
    overrides: Sequence[str] = (),
    files: FileCheck = _no_files,
) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: the TOML file.
        options_of: the attrs class of a backend's options; raises BackendError for a backend that can't be used.
        backends_with: which backends have an option, for whoever writes one that belongs to another backend.
        overrides: `section.key=value`, the values in TOML; what isn't TOML is a string.
        files: what is wrong with the files of a recipe, asked where something else is wrong, of the sections that are
            sound; the others are then harmless ones.

    Raises:
        RecipeError: with every problem there is, sorted by position.
    """
    text = _read(path)
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise RecipeError([toml_problem(error, text, path)]) from error
    except (ValueError, RecursionError) as error:  # tomli's answer to thousands of digits and to nesting hundreds deep
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        problem = Problem(code="QT002", where="recipe", message=f"not usable TOML: {reason}", origin=str(path))
        raise RecipeError([problem]) from None
    findings: list[Finding] = []
    origins: dict[positions.Path, str] = {}
    for override in overrides:
        findings += apply_override(document, override, origins)
    rewritten = legacy.rewrite(document)
    recipe, found = structure_recipe(rewritten.document, options_of, backends_with)
    found = [explain_optimizer(explain_unknown(one, rewritten.document), rewritten.document) for one in found]
    mended = mend(rewritten.document, found)
    sections = sound_sections(mended.document, [*rewritten.findings, *mended.unread])
    if rewritten.findings:  # what older spellings come to is not known then
        sections.pop("quantization", None)
    elif isinstance(table := rewritten.document.get("quantization"), dict):
        quantization, _ = _structure_quantization(table, options_of, backends_with)
        sections.update({} if quantization is None else {"quantization": quantization})
    found += mended.sure(conflicts.check_sections(sections))
    findings += [*_contradictions(rewritten.findings, rewritten.placed(found)), *rewritten.placed(found)]
    warnings = tuple(_located(rewritten.warnings, text, path, origins))
    if findings or recipe is None:
        known = {finding.path for finding in findings}
        looked_at = rewritten.placed(mended.sure(_files_of(sections, files)))
        findings += [finding for finding in looked_at if finding.path not in known]
        raise RecipeError(_located(findings, text, path, origins), warnings)
    return LoadedRecipe(recipe=recipe, path=path, text=text, origins=origins, rewritten=rewritten, warnings=warnings)


def _files_of(sections: Mapping[str, Any], files: FileCheck) -> list[Finding]:
    """What is wrong with the files that sound sections name."""
    stand_ins = {
        "model": ModelConfig(base="builtin:mini"),
        "adapter": AdapterConfig(),
        "data": DataConfig(train=(SourceConfig(dataset="none", format="chat"),)),
    }
    return list(files(Recipe(**{**stand_ins, **sections}), sections.keys()))


def _contradictions(contradictions: Iterable[Finding], found: Sequence[Finding]) -> list[Finding]:
    """The findings about older spellings, without contradictions of what is a mistake by itself."""
    wrong = {finding.path for finding in found if finding.code in UNDERSTOOD}

    def is_known(path: positions.Path | None) -> bool:
        return path is None or (path not in wrong and (*path[:-1], "backend") not in wrong)

    return [finding for finding in contradictions if is_known(finding.path) and is_known(finding.other)]


def structure_recipe(
    document: dict[str, Any], options_of: OptionsOf, backends_with: BackendsWith = _no_backends
) -> tuple[Recipe | None, list[Finding]]:
    """Structure a parsed document, the keys of `[quantization]` shared out between quantune and the backend."""
    table = document.get("quantization")
    rest = {key: value for key, value in document.items() if key != "quantization" or not isinstance(table, dict)}
    recipe, findings = structure(Recipe, rest)
    findings = [_adapter_is_missing(finding, document) for finding in findings]
    if not isinstance(table, dict):
        return recipe, findings
    quantization, found = _structure_quantization(table, options_of, backends_with)
    findings += found
    return (None if recipe is None or findings else attrs.evolve(recipe, quantization=quantization)), findings


def _structure_quantization(
    table: dict[str, Any], options_of: OptionsOf, backends_with: BackendsWith
) -> tuple[QuantizationConfig | None, list[Finding]]:
    own = [field.name for field in attrs.fields(QuantizationConfig) if field.name != "options"]
    common = {key: value for key, value in table.items() if key in own}
    quantization, findings = structure(QuantizationConfig, common, prefix=("quantization",))
    findings = [
        attrs.evolve(finding, hint="quantune backends list shows those there are")
        if finding.path == ("quantization", "backend")
        else finding
        for finding in findings
    ]
    options, found = _structure_options(table, own, options_of, backends_with)
    findings += found
    if quantization is None or findings:
        return None, findings
    return attrs.evolve(quantization, options=options), findings


def sound_sections(document: dict[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """The sections nothing was found in, so that a mistake in one hides no contradiction in the others."""
    unsound = {"quantization", *(finding.path[0] for finding in findings)}
    unsound |= {finding.meant for finding in findings if finding.meant is not None and len(finding.path) == 1}
    sections = {}
    for name, cls in get_type_hints(Recipe).items():
        if name not in unsound and (section := structure(cls, document.get(name, {}))[0]) is not None:
            sections[name] = section
    if "quantization" not in document:
        sections["quantization"] = None
    return sections


def _adapter_is_missing(finding: Finding, document: dict[str, Any]) -> Finding:
    """The finding; where it is that there is no adapter, with what that means and what to write."""
    if finding.path != ("adapter",) or finding.code != "QT010":
        return finding
    if "quantization" in document:
        message = "a quantized base is frozen, and without an adapter nothing would be trained"
        hint = "add [adapter]; the header alone takes every default"
        return Finding(code="QT120", path=("quantization",), message=message, hint=hint)
    return attrs.evolve(finding, hint="add [adapter], which is what is trained; the header alone takes every default")


def _structure_options(
    table: dict[str, Any], own: list[str], options_of: OptionsOf, backends_with: BackendsWith
) -> tuple[Any, list[Finding]]:
    backend = table.get("backend")
    if not isinstance(backend, str) or not backend.strip():
        return None, []  # already a finding
    try:
        cls = options_of(backend)
    except BackendError as error:
        return None, [Finding(code="QT015", path=("quantization", "backend"), message=error.message, hint=error.hint)]
    given = {key: value for key, value in table.items() if key not in own}
    options, findings = structure(cls, given, prefix=("quantization",), of=f' for backend "{backend}"', more=own)
    if options is None or findings:
        explained = [_explain(finding, backend, cls, given, backends_with) for finding in findings]
        return None, [*explained, *_problems_of_the_rest(cls, given, findings)]
    findings = _problems(options)
    if hasattr(options, "resolved") and not findings:
        options = options.resolved()
    return options, findings


def _problems(options: Any) -> list[Finding]:
    """What a backend says of its options together."""
    said = options.problems() if hasattr(options, "problems") else ()
    return [
        Finding(
            code="QT016",
            path=("quantization", key),
            message=message,
            of_value=not message.startswith(f"{key} "),  # the key is the subject where it has no meaning
        )
        for key, message in said
    ]


def _problems_of_the_rest(cls: type, given: dict[str, Any], findings: Sequence[Finding]) -> list[Finding]:
    """What the backend says of the options beside unknown ones, the misspelt among these read as what they mean."""
    if any(finding.code != "QT012" for finding in findings):
        return []
    meant = {str(finding.path[-1]): finding.meant for finding in findings}
    rest = {key: value for key, value in given.items() if key not in meant}
    read = {name: given[key] for key, name in meant.items() if name is not None and name not in given}
    options, wrong = structure(cls, {**read, **rest}, prefix=("quantization",))
    return [] if options is None or wrong else [one for one in _problems(options) if one.path[-1] not in read]


def _explain(finding: Finding, backend: str, cls: type, given: dict[str, Any], backends_with: BackendsWith) -> Finding:
    """The finding with what is known of the option elsewhere, or of the value that was refused."""
    key = str(finding.path[1]) if len(finding.path) > 1 else ""
    if finding.code == "QT012" and len(finding.path) == 2:
        others = [other for other in backends_with(key) if other != backend]
        if others:
            owners = " and ".join(f'"{other}"' for other in others)
            way_out = "leave it out, there is one format" if given[key] == backend else f"it is an option of {owners}"
            message = f'{key} has no meaning for backend "{backend}"'
            return attrs.evolve(finding, code="QT016", message=message, hint=way_out)
    hint: str | None = cls.hint(key, given[key]) if hasattr(cls, "hint") and key in given else None
    if hint is None and finding.code == "QT013" and isinstance(given.get(key), str):
        owners = " and ".join(f'"{other}"' for other in backends_with(key, given[key]))
        hint = f'"{given[key]}" is a {key} of {owners}' if owners else None
    return finding if hint is None else attrs.evolve(finding, hint=hint)


def _read(path: Path) -> str:
    def problem(message: str, hint: str | None = None) -> RecipeError:
        return RecipeError([Problem(code="QT001", where="recipe", message=message, hint=hint, origin=str(path))])

    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        raise problem("there is no such file", f'did you mean "{path.parent / close[0]}"?' if close else None) from None
    except IsADirectoryError:
        raise problem("expected a TOML file, found a folder") from None
    except UnicodeDecodeError as error:
        raise problem(f"expected UTF-8 text, found other bytes at position {error.start}") from None
    except OSError as error:
        raise problem(f"can't be read: {error.strerror}") from None


def _located(findings: Iterable[Finding], text: str, path: Path, origins: dict[positions.Path, str]) -> list[Problem]:
    """The findings with their positions, in the order of these; what is not in the file comes first."""
    problems = [_locate(finding, text, path, origins) for finding in findings]
    return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0, problem.where))


def _locate(finding: Finding, text: str, path: Path, origins: dict[positions.Path, str]) -> Problem:
    other = None if finding.other is None else _place(finding.other, text, origins, itself=True)
    known: dict[str, Any] = {
        "code": finding.code,
        "where": finding.where,
        "message": finding.message,
        "hint": finding.hint,
        "related": ()
        if other is None
        else (attrs.evolve(other, origin=other.origin or str(path), label=finding.other_label),),
    }
    if finding.origin is not None:
        return Problem(**known, origin=finding.origin)
    of_value = finding.code in OF_VALUES if finding.of_value is None else finding.of_value
    place = _place(finding.path, text, origins, value=of_value)
    if place is None:
        # a section that only an override made, or nothing that anything set
        made = (origin for set_path, origin in origins.items() if set_path[: len(finding.path)] == finding.path)
        return Problem(**known, origin=next(made, str(path)))
    return Problem(
        **known,
        origin=place.origin or str(path),
        line=place.line,
        column=place.column,
        source_line=place.source_line,
        underline=place.underline,
    )


def _place(
    path: positions.Path, text: str, origins: dict[positions.Path, str], *, value: bool = False, itself: bool = False
) -> Place | None:
    """Where a key stands, or what set it; one that is missing is looked for at its table, unless `itself` is asked for.

    With `value`, its value is underlined in place of the key.
    """
    for length in range(len(path), 0, -1):  # an override sets everything inside its value
        if path[:length] in origins:
            return Place(origin=origins[path[:length]])
    for length in (len(path),) if itself else range(len(path), 0, -1):
        key = positions.key_span(text, path[:length])
        if key is None:
            continue
        line = positions.lines_of(text)[key.line - 1]
        meant = (positions.value_span(text, path) if value else None) or key
        if line[meant.column - 1 :].startswith("{"):  # a table is at its key, with a header or inline
            meant = key
        return Place(line=key.line, column=key.column, source_line=line, underline=(meant.column, meant.length))
    return None
