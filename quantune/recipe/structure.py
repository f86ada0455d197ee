"""Strict structuring of plain values into attrs classes: cattrs without its coercions, and every problem as data."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from quantune.recipe.positions import Path

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Finding:
    """Something wrong at a key path; its position in the file is looked up later."""

    code: str
    path: Path
    message: str
    hint: str | None = None
    origin: str | None = None
    """What set the value, when that was not the file."""
    of_value: bool | None = None
    """Whether the value is what is wrong rather than the key, where the code does not say so."""
    other: Path | None = None
    """Another key that it is about, e.g. the one it contradicts."""
    other_label: str = ""
    """What that one says, e.g. `and this says int8`."""
    meant: str | None = None
    """What an unknown key probably is, or a value that is none of those there are."""

    @property
    def where(self) -> str:
        """The path as people write it, e.g. `data.train[0].path`."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text


class WrongType(ValueError):
    """A value is not of the type a field has."""

    def __init__(
        self, message: str, hint: str | Callable[[Path], str | None] | None = None, meant: str | None = None
    ) -> None:
        """The hint may depend on where the value stands; `meant` is the value that it probably is."""
        super().__init__(message)
        self.hint, self.meant = hint, meant


def structure(
    cls: type[T], value: Any, *, prefix: Path = (), of: str = "", more: Sequence[str] = ()
) -> tuple[T | None, list[Finding]]:
    """Structure `value` as `cls`: the instance, or None with what is wrong.

    `of` says in messages whose keys they are, and `more` lists keys that are understood beside those of `cls`.
    """
    try:
        return _CONVERTER.structure(value, cls), []
    except BaseValidationError as error:
        return None, _without_misspelt(_findings(error, prefix, cls, of, more))
    except (ValueError, TypeError) as error:
        return None, [Finding(code="QT013", path=prefix, message=str(error), hint=_hint_of(error, prefix))]


def _without_misspelt(findings: list[Finding]) -> list[Finding]:
    """The findings without that a key is missing which stands there under a name like it."""
    meant = {(*finding.path[:-1], finding.meant) for finding in findings if finding.code in ("QT011", "QT012")}
    return [finding for finding in findings if finding.code != "QT010" or finding.path not in meant]


def _hint_of(error: BaseException, path: Path) -> str | None:
    hint = getattr(error, "hint", None)
    return hint(path) if callable(hint) else hint


def _findings(error: BaseException, path: Path, cls: type | None, of: str, more: Sequence[str]) -> list[Finding]:
    """Walk an exception group; notes on the members say which key or index each belongs to."""
    if isinstance(error, ForbiddenExtraKeysError):
        return [_unknown(key, path, error.cl, of, more) for key in sorted(error.extra_fields, key=str)]
    if isinstance(error, KeyError):
        key = str(error.args[0])
        kind = "section" if not path else "key"
        table = f"[{_dotted(path)}]" if path else "the recipe"
        hint = f"expected {_expected(get_type_hints(cls)[key])}" if cls is not None and path else None
        return [Finding(code="QT010", path=(*path, key), message=f'{table} lacks the {kind} "{key}"', hint=hint)]
    if isinstance(error, BaseValidationError):
        cls = error.cl if attrs.has(error.cl) else cls
        findings: list[Finding] = []
        for member in error.exceptions:
            findings += _findings(member, (*path, *_step(member)), cls, of, more)
        return findings
    code, meant = ("QT013", error.meant) if isinstance(error, WrongType) else ("QT014", None)
    return [Finding(code=code, path=path, message=str(error), hint=_hint_of(error, path), meant=meant)]


def _step(error: BaseException) -> Path:
    """The key or index that an exception's note names."""
    if isinstance(error, KeyError):
        return ()
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (note.index,)
    return ()


def _unknown(key: str, path: Path, cls: type, of: str, more: Sequence[str]) -> Finding:
    known = [field.name for field in attrs.fields(cls) if field.name != "options"] + list(more)
    name = str(key)  # YAML has keys of other types
    meant = closest(name, known)
    code, noun = ("QT012", "key") if path else ("QT011", "section")
    listing = ", ".join(sorted(known))
    hint = f'did you mean "{meant}"?' if meant else f"there are: {listing}"
    return Finding(code=code, path=(*path, key), message=f"unknown {noun} {quoted(name)}{of}", hint=hint, meant=meant)


def closest(text: str, names: Sequence[str]) -> str | None:
    """The name that a misspelt one probably is, whatever its letters' case; None when none is like it."""
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), folded, n=1)
    return folded[close[0]] if close else None


def _dotted(path: Path) -> str:
    return Finding(code="", path=path, message="").where


def describe(value: Any) -> str:
    """A value as messages show it: what it is and of which kind."""
    kinds = {bool: "a boolean", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    kind = kinds.get(type(value), "a table" if isinstance(value, dict) else type(value).__name__)
    if isinstance(value, bool):
        return f"{str(value).lower()} ({kind})"
    if isinstance(value, str):
        return f"{quoted(value)} ({kind})"
    return kind if isinstance(value, dict | list) else f"{value} ({kind})"


def quoted(text: str, longest: int = 80) -> str:
    """The text in quotes, on one line and without control characters."""
    return json.dumps(text if len(text) <= longest else f"{text[:longest]}...", ensure_ascii=False)


def _whole(value: int) -> int:
    """TOML's whole numbers have 64 bits; a larger one would only fail later, in torch."""
    if not -(2**63) <= value < 2**63:
        raise ValueError("must fit into 64 bits")
    return value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large for a number") from None


def _text(value: str) -> str:
    """No name of a file or module holds NUL, and functions that take one fail at it."""
    if "\0" in value:
        raise ValueError("must not hold the character NUL")
    return value


def _scalar(accepted: tuple[type, ...], name: str, convert: Any = None) -> Any:
    def hook(value: Any, _: Any) -> Any:
        if (isinstance(value, bool) and bool not in accepted) or not isinstance(value, accepted):
            raise WrongType(f"expected {name}, found {describe(value)}", _without_quotes(value, accepted))
        return convert(value) if convert else value

    return hook


def _without_quotes(value: Any, accepted: Sequence[Any]) -> str | None:
    """What to write in place of a text that says a number or a boolean where one is expected."""
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    if bool in accepted and word in (*_YES, *_NO):
        return f"write {str(word in _YES).lower()}, without quotes"
    try:
        number = float(word)
    except ValueError:
        return None
    if (float in accepted or (int in accepted and number.is_integer())) and math.isfinite(number):
        return "remove the quotes"
    return None


_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")


def _expected(annotation: Any) -> str:
    """What a field of this type takes, in words."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is Literal:
        values = [json.dumps(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(annotation) in (tuple, list):
        members = {str: "strings", int: "whole numbers", float: "numbers", bool: "booleans"}
        return f"a list of {members.get(get_args(annotation)[0], 'tables')}"
    if is_union(annotation):
        return " or ".join(_expected(member) for member in get_args(annotation) if member is not type(None))
    return "a table"


def is_union(annotation: Any) -> bool:
    """Whether an annotation is `A | B`."""
    return get_origin(annotation) in (Union, types.UnionType)


def _structure_union(value: Any, annotation: Any) -> Any:
    """The first member type that the value is of; a value of a tuple or class member is structured as that member."""
    for member in get_args(annotation):
        if member is type(None):
            continue
        origin = get_origin(member)
        if origin is Literal and _is_among(value, get_args(member)):
            return value
        if (origin in (tuple, list) and isinstance(value, list)) or (attrs.has(member) and isinstance(value, dict)):
            return _CONVERTER.structure(value, member)
        if member in (int, float, str, bool) and not (isinstance(value, bool) and member is not bool):
            if isinstance(value, member) or (member is float and isinstance(value, int)):
                return _CONVERTER.structure(value, member)
    members = get_args(annotation)
    names = [name for member in members if get_origin(member) is Literal for name in get_args(member)]
    raise _none_of(annotation, value, names, _without_quotes(value, members))


def _none_of(annotation: Any, value: Any, names: Sequence[Any], hint: str | None = None) -> WrongType:
    meant = None if hint else _word_meant(value, names)
    message = f"expected {_expected(annotation)}, found {describe(value)}"
    return WrongType(message, f'did you mean "{meant}"?' if meant else hint, meant)


def _word_meant(value: Any, names: Sequence[Any]) -> str | None:
    """The word that may be meant; one that the value goes on from (`adamw_torch`) before one that is like it."""
    if not isinstance(value, str):
        return None
    words = [name for name in names if isinstance(name, str)]
    begun = [word for word in words if len(word) > 3 and value.lower().startswith(f"{word}_")]
    return max(begun, key=len) if begun else closest(value, words)


def _is_among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether the value is one of a Literal's, in kind too: `true` is not 1."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _structure_literal(value: Any, annotation: Any) -> Any:
    allowed = get_args(annotation)
    if _is_among(value, allowed):
        return value
    raise _none_of(annotation, value, allowed)


def _class_hook(cls: Any) -> Any:
    attrs.resolve_types(cls)
    checked: dict[str, Any] = {field.name: override(struct_hook=_checked(field)) for field in attrs.fields(cls)}
    inner = make_dict_structure_fn(cls, _CONVERTER, **checked)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            hint = _as_table if isinstance(value, list) and all(isinstance(one, dict) for one in value) else None
            raise WrongType(f"expected a table, found {describe(value)}", hint)
        return inner(value, cls)

    return hook


def _as_table(path: Path) -> str | None:
    return None if any(isinstance(part, int) for part in path) else f"write [{_dotted(path)}]"


def _as_tables(path: Path) -> str | None:
    return None if any(isinstance(part, int) for part in path) else f"write [[{_dotted(path)}]]"


def _checked(field: Any) -> Any:
    """Structure one field and run its validator at once, so that one wrong field does not hide another."""

    def hook(value: Any, annotation: Any) -> Any:
        structured = _CONVERTER.structure(value, annotation)
        if field.validator is not None:
            field.validator(None, field, structured)
        return structured

    return hook


def _list_hook(annotation: Any) -> Any:
    member, container = get_args(annotation)[0], get_origin(annotation)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            hint = _as_tables if attrs.has(member) and isinstance(value, dict) else None
            raise WrongType(f"expected {_expected(annotation)}, found {describe(value)}", hint)
        return container(_each(value, member))

    return hook


def _dict_hook(annotation: Any) -> Any:
    member = get_args(annotation)[1]

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise WrongType(f"expected a table, found {describe(value)}")
        if member is Any:
            return dict(value)
        structured, errors = {}, []
        for key, held in value.items():
            try:
                structured[key] = _CONVERTER.structure(held, member)
            except (ValueError, BaseValidationError) as error:
                error.__notes__ = [*getattr(error, "__notes__", ()), AttributeValidationNote(key, key, member)]
                errors.append(error)
        if errors:
            raise IterableValidationError("values can't be used", errors, dict)
        return structured

    return hook


def _each(values: list[Any], member: Any) -> list[Any]:
    """Structure every value of a list, and say of all that fail at which index they stand."""
    structured, errors = [], []
    for index, value in enumerate(values):
        try:
            structured.append(_CONVERTER.structure(value, member))
        except (ValueError, BaseValidationError) as error:
            note = IterableValidationNote(f"element {index}", index, member)
            error.__notes__ = [*getattr(error, "__notes__", ()), note]
            errors.append(error)
    if errors:
        raise IterableValidationError("elements can't be used", errors, list)
    return structured


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(int, _scalar((int,), "a whole number", _whole))
    converter.register_structure_hook(float, _scalar((int, float), "a number", _float))
    converter.register_structure_hook(str, _scalar((str,), "a string", _text))
    converter.register_structure_hook(bool, _scalar((bool,), "true or false"))
    converter.register_structure_hook_func(is_union, _structure_union)
    converter.register_structure_hook_func(lambda t: get_origin(t) is Literal, _structure_literal)
    converter.register_structure_hook_factory(lambda t: get_origin(t) in (tuple, list), _list_hook)
    converter.register_structure_hook_factory(lambda t: get_origin(t) is dict, _dict_hook)
    converter.register_structure_hook_factory(attrs.has, _class_hook)
    return converter


_CONVERTER = _make_converter()
