"""Which formats to compare: every weight dtype of every built-in backend with its defaults, or those that are named.

No third party's code is imported unless its backend is named, and torch is not imported at all.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence

import attrs

from quantune.backends import registry
from quantune.backends.registry import FoundBackend
from quantune.errors import BackendError, InputError
from quantune.recipe.schema import QuantizationConfig
from quantune.recipe.structure import structure


@attrs.frozen(kw_only=True)
class Format:
    """A backend with one of its weight dtypes and default options."""

    name: str
    """`backend:weight_dtype`, or the backend's name where it has one format."""
    quantization: QuantizationConfig | None = None
    built_in: bool = True
    problem: str | None = None
    """Why it can't be used, when that is known already; then there is no `quantization`."""


def select(only: Sequence[str] | None = None) -> tuple[Format, ...]:
    """All formats of the built-in backends, or those named in `only`: `backend:weight_dtype`, or `backend` for all of
    its formats. Every format comes once, in the order they are named.

    Raises:
        InputError: nothing is named, or something that is not there; the message lists what there is.
    """
    found = {backend.name: backend for backend in registry.find()}
    built_in = [format for name in registry.BUILT_IN for format in _formats_of(found[name])]
    if only is None:
        return tuple(built_in)
    names = [name.strip() for part in only for name in part.split(",") if name.strip()]
    if not names:
        raise InputError(f"--only: expected names of formats, found none. There are: {_listing(built_in, found)}")
    chosen: dict[str, Format] = {}
    for name in names:
        backend = name.partition(":")[0]
        there = _formats_of(found[backend]) if backend in found else []
        matching = [format for format in there if name in (backend, format.name) or format.problem]
        if not matching:
            raise InputError(_unknown(name, [*built_in, *there], found))
        chosen.update((format.name, format) for format in matching)
    return tuple(chosen.values())


def _formats_of(found: FoundBackend) -> list[Format]:
    """The formats of one backend; of one that can't be imported, a single one that says why."""
    built_in = found.name in registry.BUILT_IN
    try:
        description = registry.describe(found.name)
    except BackendError as error:
        return [Format(name=found.name, built_in=built_in, problem=str(error))]
    formats = []
    for weight_dtype in description.weight_dtypes or (None,):
        name = found.name if weight_dtype is None else f"{found.name}:{weight_dtype}"
        given = {} if weight_dtype is None else {"weight_dtype": weight_dtype}
        options, findings = structure(description.options, given)
        if options is None:
            problem = "its options have no defaults: " + "; ".join(finding.message for finding in findings)
            formats.append(Format(name=name, built_in=built_in, problem=problem))
            continue
        if hasattr(options, "resolved"):
            options = options.resolved()
        quantization = QuantizationConfig(backend=found.name, options=options)
        formats.append(Format(name=name, built_in=built_in, quantization=quantization))
    return formats


def _unknown(name: str, formats: Iterable[Format], found: Mapping[str, FoundBackend]) -> str:
    known = [format.name for format in formats]
    close = difflib.get_close_matches(name, [*known, *found], n=1)
    suggestion = f' (did you mean "{close[0]}"?)' if close else ""
    backend = name.partition(":")[0]
    package = registry.KNOWN_PLUGINS.get(backend) if backend not in found else None
    install = f"; pip install {package} brings {backend}" if package else ""
    return f"--only: there is no format {json.dumps(name)}{suggestion}. There are: {_listing(formats, found)}{install}"


def _listing(formats: Iterable[Format], found: Mapping[str, FoundBackend]) -> str:
    """Formats whose backends were described, and the names of the other backends."""
    names = dict.fromkeys(format.name for format in formats)
    described = {name.partition(":")[0] for name in names}
    others = [name for name, backend in found.items() if name not in described and backend.problem is None]
    return ", ".join([*names, *others])
