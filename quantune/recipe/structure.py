"""Strict structuring of plain values into attrs classes: cattrs without its coercions, and every problem as data."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
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

    @property
    def where(self) -> str:
        """The path as people write it, e.g. `data.train[0].path`."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text


class WrongType(ValueError):
    """A value is not of the type a field has."""


def structure(
    cls: type[T], value: Any, *, prefix: Path = (), of: str = "", more: Sequence[str] = ()
) -> tuple[T | None, list[Finding]]:
    """Structure `value` as `cls`: the instance, or None with what is wrong.

    `of` says in messages whose keys they are, and `more` lists keys that are understood beside those of `cls`.
    """
    try:
        return _CONVERTER.structure(value, cls), []
    except BaseValidationError as error:
        return None, list(_findings(error, prefix, cls, of, more))
    except (ValueError, TypeError) as error:
        return None, [Finding(code="QT013", path=prefix, message=str(error))]


def _findings(error: BaseException, path: Path, cls: type | None, of: str, more: Sequence[str]) -> list[Finding]:
    """Walk an exception group; notes on the members say which key or index each belongs to."""
    if isinstance(error, ForbiddenExtraKeysError):
        return [_unknown(key, path, error.cl, of, more) for key in sorted(error.extra_fields)]
    if isinstance(error, KeyError):
        key = str(error.args[0])
        kind = "section" if not path else "key"
        table = f"[{_dotted(path)}]" if path else "the recipe"
        return [Finding(code="QT010", path=(*path, key), message=f'{table} lacks the {kind} "{key}"')]
    if isinstance(error, BaseValidationError):
        cls = error.cl if attrs.has(error.cl) else cls
        findings: list[Finding] = []
        for member in error.exceptions:
            findings += _findings(member, (*path, *_step(member)), cls, of, more)
        return findings
    code = "QT013" if isinstance(error, WrongType) else "QT014"
    return [Finding(code=code, path=path, message=str(error))]


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
    close = difflib.get_close_matches(key, known, n=1)
    code, noun = ("QT012", "key") if path else ("QT011", "section")
    listing = ", ".join(sorted(known))
    hint = f'did you mean "{close[0]}"?' if close else f"there are: {listing}"
    return Finding(code=code, path=(*path, key), message=f'unknown {noun} "{key}"{of}', hint=hint)


def _dotted(path: Path) -> str:
    return Finding(code="", path=path, message="").where


def _describe(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    kind = kinds.get(type(value), "a table" if isinstance(value, dict) else type(value).__name__)
    if isinstance(value, bool):
        return f"{str(value).lower()} ({kind})"
    if isinstance(value, str):
        return f'"{value}" ({kind})'
    return kind if isinstance(value, dict | list) else f"{value} ({kind})"


def _scalar(accepted: tuple[type, ...], name: str, convert: Any = None) -> Any:
    def hook(value: Any, _: Any) -> Any:
        if isinstance(value, bool) and bool not in accepted or not isinstance(value, accepted):
            raise WrongType(f"expected {name}, found {_describe(value)}")
        return convert(value) if convert else value

    return hook


def _expected(annotation: Any) -> str:
    """What a field of this type takes, in words."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is Literal:
        values = [f'"{value}"' for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(annotation) is tuple:
        return "a list of strings" if get_args(annotation)[0] is str else "a list of tables"
    if _is_union(annotation):
        return " or ".join(_expected(member) for member in get_args(annotation) if member is not type(None))
    return "a table"


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _structure_union(value: Any, annotation: Any) -> Any:
    """The first member type that the value is of; a value of a tuple or class member is structured as that member."""
    for member in get_args(annotation):
        if member is type(None):
            continue
        origin = get_origin(member)
        if origin is Literal and value in get_args(member):
            return value
        if (origin is tuple and isinstance(value, list)) or (attrs.has(member) and isinstance(value, dict)):
            return _CONVERTER.structure(value, member)
        if member in (int, float, str, bool) and not (isinstance(value, bool) and member is not bool):
            if isinstance(value, member) or (member is float and isinstance(value, int)):
                return member(value)
    raise WrongType(f"expected {_expected(annotation)}, found {_describe(value)}")


def _structure_literal(value: Any, annotation: Any) -> Any:
    allowed = get_args(annotation)
    if isinstance(value, str) and value in allowed:
        return value
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    suggestion = f' (did you mean "{close[0]}"?)' if close else ""
    raise WrongType(f"expected {_expected(annotation)}, found {_describe(value)}{suggestion}")


def _class_hook(cls: Any) -> Any:
    attrs.resolve_types(cls)
    checked: dict[str, Any] = {field.name: override(struct_hook=_checked(field)) for field in attrs.fields(cls)}
    inner = make_dict_structure_fn(cls, _CONVERTER, **checked)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise WrongType(f"expected a table, found {_describe(value)}")
        return inner(value, cls)

    return hook


def _checked(field: Any) -> Any:
    """Structure one field and run its validator at once, so that one wrong field does not hide another."""

    def hook(value: Any, annotation: Any) -> Any:
        structured = _CONVERTER.structure(value, annotation)
        if field.validator is not None:
            field.validator(None, field, structured)
        return structured

    return hook


def _tuple_hook(annotation: Any) -> Any:
    (member, _) = get_args(annotation)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise WrongType(f"expected {_expected(annotation)}, found {_describe(value)}")
        return tuple(_CONVERTER.structure(value, list[member]))  # type: ignore[valid-type]

    return hook


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(int, _scalar((int,), "a whole number"))
    converter.register_structure_hook(float, _scalar((int, float), "a number", float))
    converter.register_structure_hook(str, _scalar((str,), "a string"))
    converter.register_structure_hook(bool, _scalar((bool,), "true or false"))
    converter.register_structure_hook_func(_is_union, _structure_union)
    converter.register_structure_hook_func(lambda t: get_origin(t) is Literal, _structure_literal)
    converter.register_structure_hook_factory(lambda t: get_origin(t) is tuple, _tuple_hook)
    converter.register_structure_hook_factory(attrs.has, _class_hook)
    return converter


_CONVERTER = _make_converter()
