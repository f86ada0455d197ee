"""Where backends come from: the built-in ones and the entry points of installed packages, side by side.

Finding reads package metadata only; nothing of a third party is imported until its backend is asked for by name.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import attrs

import quantune
from quantune.backends.description import API_VERSION, ENTRY_POINT_GROUP, BackendDescription, Probe
from quantune.backends.discovery import NAME, Claim, claims, in_words, plain
from quantune.errors import BackendError, MissingBackendError

if TYPE_CHECKING:
    from quantune.backends.backend import Backend

BUILT_IN = {name: f"quantune.backends.{name}:description" for name in ("bnb", "torchao", "mxfp4", "fp8")}
KNOWN_PLUGINS = {"hqq": "quantune-hqq"}
"""Backends that have a package of their own: naming one that is not installed says how to install it."""


@attrs.frozen(kw_only=True)
class FoundBackend:
    """A backend that is installed, not imported yet."""

    name: str
    package: str
    version: str
    value: str
    """Where its description is, `module:attribute`."""
    problem: str | None = None
    """Why it can't be used, when that is known without importing it."""


def find() -> tuple[FoundBackend, ...]:
    """All installed backends, built-in ones first, then by name."""
    return tuple([*(_built_in(name) for name in BUILT_IN), *_third_party(claims())])


@attrs.frozen(kw_only=True)
class BackendStatus:
    """A row of `quantune backends list`."""

    name: str
    package: str
    version: str
    summary: str | None = None
    weight_dtypes: tuple[str, ...] = ()
    bits_per_weight: Mapping[str, float] = attrs.field(factory=dict)
    devices: tuple[str, ...] = ()
    status: str
    """`available`, `unavailable`, `broken`, or `installed` for a third party's, which is not imported to list it."""
    reason: str | None = None
    install: str | None = None
    hint: str | None = None
    """What says more."""

    def as_dict(self) -> dict[str, object]:
        """The row as JSON can hold it."""
        return attrs.asdict(self)


def status(found: FoundBackend) -> BackendStatus:
    """What can be said of a backend without importing a third party's code."""
    known: dict[str, Any] = {"name": found.name, "package": found.package, "version": found.version}
    if found.problem:
        return BackendStatus(**known, status="broken", reason=found.problem)
    if found.name not in BUILT_IN:
        hint = f"quantune backends check {found.name} looks closer"
        return BackendStatus(**known, status="installed", hint=hint)
    description = load_description(found)
    probe = probe_of(description)
    return BackendStatus(
        **known,
        summary=description.summary,
        weight_dtypes=description.weight_dtypes,
        bits_per_weight=dict(description.bits_per_weight),
        devices=probe.devices,
        status="available" if probe.available else "unavailable",
        reason=probe.reason,
        install=probe.install,
    )


def named(name: str) -> FoundBackend:
    """The installed backend called `name`, usable or not.

    Raises:
        BackendError: there is none; says which there are, which one may be meant, or how to install it.
    """
    if name in BUILT_IN:  # whatever else is installed
        return _built_in(name)
    found = {backend.name: backend for backend in find()}
    if name in found:
        return found[name]
    usable = [backend.name for backend in found.values() if backend.problem is None]
    listing = ", ".join(f'"{one}"' for one in sorted(usable))
    message = f'expected one of the installed backends {listing}, found "{plain(name, 80)}"'
    raise BackendError(message, _way_out(name, usable).removeprefix("; ") or None)


def describe(name: str) -> BackendDescription:
    """The description of the backend called `name`; imports its torch-free module.

    Raises:
        BackendError: there is no such backend, two packages claim the name, or its package is broken.
    """
    return load_description(named(name))


def describe_available(name: str) -> BackendDescription:
    """The description of the backend called `name`, which can run here.

    Raises:
        BackendError: as `describe`; or it can't run here, with what is missing and how to install it.
    """
    description = describe(name)
    probe = probe_of(description)
    if not probe.available:
        way_out = f"; {plain(probe.install)}" if probe.install else ""
        raise MissingBackendError(
            f'backend "{name}" can\'t run here: {plain(probe.reason or "its probe says so")}{way_out}'
        )
    return description


def options_of(name: str) -> type:
    """The options class of the backend called `name`."""
    return describe(name).options


def backends_with_option(key: str, value: str | None = None) -> tuple[str, ...]:
    """Names of the built-in backends that have an option called `key`, and, where given, the weight dtype `value`."""
    descriptions = {name: describe(name) for name in BUILT_IN}
    return tuple(
        name
        for name, description in descriptions.items()
        if key in attrs.fields_dict(description.options) and (value is None or value in description.weight_dtypes)
    )


def probe_of(description: BackendDescription) -> Probe:
    """What a backend says about running here.

    Raises:
        BackendError: it says nothing: its probe fails, or returns something else.
    """
    try:
        with _stdout_as_stderr():
            probe = description.probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's code can raise anything, SystemExit too
        raise BackendError(f'the probe of backend "{description.name}" fails: {in_words(error)}') from error
    if not isinstance(probe, Probe):
        raise BackendError(
            f'expected the probe of backend "{description.name}" to return a Probe, found {type(probe).__name__}'
        )
    devices_of = probe.devices_of.values() if isinstance(probe.devices_of, Mapping) else [None]
    texts = [text for text in (probe.reason, probe.install) if text is not None]
    if not (all(map(_are_names, [probe.devices, *devices_of])) and _are_names(texts)):
        raise BackendError(
            f'the probe of backend "{description.name}" returns a Probe whose values are of other types than it '
            f"declares: {plain(repr(probe), 200)}"
        )
    return probe


def load_backend(description: BackendDescription) -> Backend:
    """Import the tensor code of a backend, and torch with it.

    Raises:
        BackendError: it can't be imported, lacks a hook, or is no `Backend`.
    """
    from quantune.backends.backend import Backend

    try:
        with _stdout_as_stderr():
            backend = description.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as in `probe_of`
        raise MissingBackendError(f'backend "{description.name}" can\'t be loaded: {in_words(error)}') from error
    if not isinstance(backend, Backend):
        found = f"the class {backend.__name__}" if isinstance(backend, type) else type(backend).__name__
        raise BackendError(f'expected load() of backend "{description.name}" to return a Backend, found {found}')
    if getattr(backend, "name", None) != description.name:
        found = repr(getattr(backend, "name", None))
        raise BackendError(f'expected the name of backend "{description.name}" on its Backend, found {plain(found)}')
    return backend


def require_device(description: BackendDescription, weight_dtype: str | None, device: str) -> None:
    """Require that a backend runs on a type of device (`cpu`, `cuda`) in the format a recipe asks for.

    Args:
        weight_dtype: None for a backend without that option.

    Raises:
        BackendError: it doesn't; says where it does, and what of the backend would run on `device`.
    """
    probe = probe_of(description)

    def runs_on(dtype: str | None) -> tuple[str, ...]:
        return tuple(probe.devices_of.get(dtype or "", probe.devices))

    devices = runs_on(weight_dtype)
    if device in devices or not (probe.devices or devices):  # a probe that names no device restricts nothing
        return
    what = f" with weight_dtype = {_quoted(weight_dtype)}" if weight_dtype else ""
    others = [_quoted(dtype) for dtype in description.weight_dtypes if device in runs_on(dtype)]
    ways_out = [f"use weight_dtype = {' or '.join(others)}"] if others else []
    if devices:
        ways_out.append(f"train with [training] device = {' or '.join(_quoted(one) for one in devices)}")
    ways_out.append("see what runs where with quantune backends list")
    raise BackendError(
        f'backend "{description.name}"{what} runs on {" and ".join(devices) or "no device"}, '
        f"and this run is on {device}; {', or '.join(ways_out)}"
    )


def load_description(found: FoundBackend) -> BackendDescription:
    """Import the description of a backend.

    Raises:
        BackendError: its package is broken, or the name is not its own.
    """
    if found.problem:
        raise BackendError(f'backend "{found.name}" can\'t be used: {found.problem}')
    whose = f'backend "{found.name}" of package {found.package}'
    try:
        with _stdout_as_stderr():
            entry_point = metadata.EntryPoint(name=found.name, value=found.value, group=ENTRY_POINT_GROUP)
            description = entry_point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's import can raise anything; say which package it was
        raise BackendError(
            f"{whose} {found.version} can't be imported: {in_words(error)}. Reinstall or uninstall {found.package}"
        ) from error
    if not isinstance(description, BackendDescription):
        found_type = type(description).__name__
        raise BackendError(f"{whose}: expected its entry point to be a BackendDescription, found {found_type}")
    if description.api_version != API_VERSION:
        raise BackendError(
            f"{whose} was written for version {plain(str(description.api_version), 20)} of the backend protocol, this "
            f"quantune has version {API_VERSION}; update {found.package} or quantune"
        )
    try:
        problem = _problem_of(description, found.name)
    except Exception as error:  # values that can't even be compared or shown
        problem = f"its description can't be read: {in_words(error)}"
    if problem:
        raise BackendError(f"{whose}: {problem}")
    return description


def _problem_of(description: BackendDescription, name: str) -> str | None:
    """What of a description is not what the protocol says; its author's checker may never have seen it."""
    options, dtypes, bits = description.options, description.weight_dtypes, description.bits_per_weight
    if description.name != name:
        return f"expected its description to have the same name, found {plain(repr(description.name), 80)}"
    if not (isinstance(options, type) and attrs.has(options)):
        return f"expected its options to be an attrs class, found {plain(repr(options), 80)}"
    if not _are_names(dtypes):
        return f"expected its weight_dtypes to be a tuple of strings, found {plain(repr(dtypes), 80)}"
    if dtypes and "weight_dtype" not in attrs.fields_dict(options):
        return "it names weight_dtypes, and its options have no weight_dtype"
    if not (isinstance(bits, Mapping) and all(_is_bits(*item) for item in bits.items())):
        return f"expected its bits_per_weight to map names to numbers, found {plain(repr(bits), 80)}"
    if not _are_names(description.adopts):
        return f"expected its adopts to be a tuple of strings, found {plain(repr(description.adopts), 80)}"
    if description.adopts and not callable(getattr(options, "checkpoint_problem", None)):
        return "it adopts checkpoints, and its options have no method checkpoint_problem"
    for method in ("activation_dtypes", "activations_when_read"):
        if not callable(getattr(options, method, lambda: None)):
            return f"expected {method} of its options to be a method, found {plain(repr(getattr(options, method)), 80)}"
    if not isinstance(description.summary, str):
        return f"expected its summary to be a string, found {plain(repr(description.summary), 80)}"
    return None


def _quoted(text: str) -> str:
    return f'"{plain(text)}"'


def _is_bits(name: object, bits: object) -> bool:
    return isinstance(name, str) and isinstance(bits, int | float) and math.isfinite(bits)


def _are_names(values: object) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(value, str) for value in values)


def _built_in(name: str) -> FoundBackend:
    return FoundBackend(name=name, package="quantune", version=quantune.__version__, value=BUILT_IN[name])


def _third_party(found: Iterable[Claim]) -> list[FoundBackend]:
    claimed: dict[str, list[Claim]] = {}
    for claim in found:
        claimed.setdefault(claim.name, []).append(claim)
    backends = []
    for name, claimants in sorted(claimed.items()):
        if name in BUILT_IN:
            backends += [_impostor(claim) for claim in claimants]
            continue
        claimants = sorted(claimants, key=lambda claim: (claim.package, claim.version))
        packages = list(dict.fromkeys(claim.package for claim in claimants))
        problem = claimants[0].problem
        if len(packages) > 1 and NAME.fullmatch(name):
            problem = f"claimed by {' and '.join(packages)}; uninstall all but one"
        elif len({claim.value for claim in claimants}) > 1:
            problem = problem or f"the entry_points.txt of {packages[0]} names it more than once"
        backends.append(
            FoundBackend(
                name=name,
                package=", ".join(packages),
                version=", ".join(dict.fromkeys(claim.version for claim in claimants)),
                value=claimants[0].value,
                problem=problem,
            )
        )
    return backends


def _impostor(claim: Claim) -> FoundBackend:
    """A row of its own: a built-in can't be shadowed."""
    return FoundBackend(
        name=f"{claim.name} ({claim.package})",
        package=claim.package,
        version=claim.version,
        value=claim.value,
        problem=f"{claim.package} claims the name of a built-in backend, which stays what it is",
    )


def _way_out(name: str, usable: Iterable[str]) -> str:
    """What may have been meant by a name that no backend has."""
    if name in KNOWN_PLUGINS:
        return f"; {name} is a package of its own: pip install {KNOWN_PLUGINS[name]}"
    owners = [f'"{one}"' for one in BUILT_IN if name in describe(one).weight_dtypes]
    if owners:
        return f'; "{name}" is a weight_dtype of {" and ".join(owners)}'
    close = difflib.get_close_matches(name.lower(), sorted({*usable, *KNOWN_PLUGINS}), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _stdout_as_stderr() -> contextlib.AbstractContextManager[Any]:
    """Standard output is for results, as JSON too; what a package prints while it is imported is none."""
    return contextlib.redirect_stdout(sys.stderr)
