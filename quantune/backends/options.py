"""The options of a backend, for people: each with its type, default and meaning, and a piece of recipe to start from.

Options classes come from anyone: one without docstrings, source or usable annotations costs its own words only.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs
import tomlkit
from tomlkit.exceptions import TOMLKitError

from quantune.backends.description import BackendDescription
from quantune.backends.discovery import plain
from quantune.errors import BackendError
from quantune.recipe.reference import default_words, field_docs_if_any, type_words
from quantune.recipe.structure import structure

DOC_LENGTH = 600


@attrs.frozen(kw_only=True)
class Option:
    """One key of a backend under `[quantization]`."""

    key: str
    type: str
    default: str | None
    """As a recipe writes it; None where nothing is set by default."""
    required: bool
    doc: str


def options_in_words(cls: type) -> tuple[Option, ...]:
    """The keys of an options class."""
    docs, hints = field_docs_if_any(cls), _hints(cls)
    return tuple(
        Option(
            key=field.name,
            type=_type(hints.get(field.name, field.type)),
            default=_default(field),
            required=field.default is attrs.NOTHING,
            doc=plain(docs.get(field.name, ""), DOC_LENGTH),
        )
        for field in attrs.fields(cls)
    )


def default_options(description: BackendDescription, weight_dtype: str | None = None) -> Any:
    """The options that a recipe has which names the backend and at most `weight_dtype`.

    Raises:
        BackendError: the backend refuses that; with what it says.
    """
    given = {} if weight_dtype is None else {"weight_dtype": weight_dtype}
    options, findings = structure(description.options, given, prefix=("quantization",))
    said = [f"[{finding.where}] {finding.message}" for finding in findings]
    if options is not None and hasattr(options, "problems"):
        said += [f"[quantization.{key}] {message}" for key, message in options.problems()]
    if said or options is None:
        raise BackendError(f"its default options are refused: {plain('; '.join(said))}")
    return options.resolved() if hasattr(options, "resolved") else options


def choose_dtype(description: BackendDescription, asked: str | None) -> str | None:
    """The weight dtype asked for, or without one the backend's default or first; None for a backend of one format.

    Raises:
        BackendError: the backend does not have the one asked for.
    """
    if asked is None:
        return _first_dtype(description)
    if asked in description.weight_dtypes:
        return asked
    if not description.weight_dtypes:
        raise BackendError(f'backend "{description.name}" has one format and takes no weight_dtype, found "{asked}"')
    listing = ", ".join(f'"{plain(one)}"' for one in description.weight_dtypes)
    close = difflib.get_close_matches(asked, description.weight_dtypes, n=1)
    suggestion = f'; did you mean "{plain(close[0])}"?' if close else ""
    raise BackendError(
        f'expected one of {listing} as weight_dtype of backend "{description.name}", found "{asked}"{suggestion}'
    )


def snippet(description: BackendDescription) -> str:
    """`[quantization]` as a recipe has it, with every other key as a comment that shows its default."""
    weight_dtype = _first_dtype(description)
    try:
        options = default_options(description, weight_dtype)
    except Exception:  # a plugin's own check; the class still says what its keys are
        options = None
    lines = ["[quantization]", f"backend = {_toml(description.name)}"]
    if weight_dtype is not None:
        others = [_toml(one) for one in description.weight_dtypes if one != weight_dtype]
        lines.append(f"weight_dtype = {_toml(weight_dtype)}" + (f"  # or {', '.join(others)}" if others else ""))
    for field in attrs.fields(description.options):
        if field.name != "weight_dtype" or weight_dtype is None:
            lines.append(_line(field, options, _hints(description.options).get(field.name)))
    return "\n".join(lines) + "\n"


def _first_dtype(description: BackendDescription) -> str | None:
    """The weight dtype by default, or the first there is."""
    field = attrs.fields_dict(description.options).get("weight_dtype")
    if field is None:
        return None
    if isinstance(field.default, str):
        return field.default
    return description.weight_dtypes[0] if description.weight_dtypes else None


def _line(field: Any, options: Any, annotation: Any) -> str:
    key = plain(field.name, 80)
    if field.default is attrs.NOTHING:
        if get_origin(annotation) is Literal:
            first, *others = [_toml(value) for value in get_args(annotation)]
            return f"{key} = {first}" + (f"  # or {', '.join(others)}" if others else "")
        return f"# {key} = ...  (required: {_type(annotation)})"
    value = getattr(options, field.name, None if isinstance(field.default, attrs.Factory) else field.default)  # type: ignore[arg-type]  # a class at run time
    return f"# {key} is unset by default" if value is None else f"# {key} = {_toml(value)}"


def _toml(value: Any) -> str:
    try:
        return plain(tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string())
    except (TOMLKitError, TypeError, ValueError):  # nothing that a recipe could say
        return plain(repr(value), 80)


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # annotations are the author's code: names that exist for a checker only, and anything else
        return {}


def _type(annotation: Any) -> str:
    try:
        return plain(type_words(annotation).replace("`", ""), 200)
    except (TypeError, IndexError):  # a Literal of values that JSON can't say, a list of nothing
        return plain(str(annotation), 200)


def _default(field: Any) -> str | None:
    try:
        words = default_words(field).replace("`", "")
    except Exception:  # a factory that fails, or a value that JSON can't say
        return plain(repr(field.default), 80)
    return None if words in ("", "required") else plain(words, 200)
