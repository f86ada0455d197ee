"""Where backends come from: the built-in ones and the entry points of installed packages, side by side.

Finding reads package metadata only; nothing of a third party is imported until its backend is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any

import attrs

import quantune
from quantune.backends.description import API_VERSION, ENTRY_POINT_GROUP, BackendDescription
from quantune.errors import BackendError

BUILT_IN = {name: f"quantune.backends.{name}:description" for name in ("bnb", "torchao", "mxfp4", "fp8")}
KNOWN_PLUGINS = {"hqq": "quantune-hqq"}
"""Backends that have a package of their own: naming one that is not installed says how to install it."""


@attrs.frozen(kw_only=True)
class FoundBackend:
    """A backend that is installed, not imported yet."""

    name: str
    package: str
    version: str
    entry_point: metadata.EntryPoint
    problem: str | None = None
    """Why it can't be used, when that is known without importing it."""


def find() -> tuple[FoundBackend, ...]:
    """All installed backends, built-in ones first, then by name."""
    plugins = metadata.entry_points(group=ENTRY_POINT_GROUP)
    return tuple([*_built_in(), *_third_party(plugins)])


@attrs.frozen(kw_only=True)
class BackendStatus:
    """A row of `quantune backends list`."""

    name: str
    package: str
    version: str
    weight_dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    status: str
    """`available`, `unavailable`, `broken`, or `installed` for a third party's, which is not imported to list it."""
    reason: str | None = None
    install: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The row as JSON can hold it."""
        return attrs.asdict(self)


def status(found: FoundBackend) -> BackendStatus:
    """What can be said of a backend without importing a third party's code."""
    known: dict[str, Any] = {"name": found.name, "package": found.package, "version": found.version}
    if found.problem:
        return BackendStatus(**known, status="broken", reason=found.problem)
    if found.name not in BUILT_IN:
        return BackendStatus(**known, status="installed")
    description = _load(found)
    probe = description.probe()
    return BackendStatus(
        **known,
        weight_dtypes=description.weight_dtypes,
        devices=probe.devices,
        status="available" if probe.available else "unavailable",
        reason=probe.reason,
        install=probe.install,
    )


def describe(name: str) -> BackendDescription:
    """The description of the backend called `name`; imports its torch-free module.

    Raises:
        BackendError: there is no such backend, two packages claim the name, or its package is broken.
    """
    found = {backend.name: backend for backend in find()}
    if name not in found:
        install = f"; pip install {KNOWN_PLUGINS[name]}" if name in KNOWN_PLUGINS else ""
        raise BackendError(f'expected one of the installed backends {_listing(found)}, found "{name}"{install}')
    return _load(found[name])


def describe_available(name: str) -> BackendDescription:
    """The description of the backend called `name`, which can run here.

    Raises:
        BackendError: as `describe`; or it can't run here, with what is missing and how to install it.
    """
    description = describe(name)
    probe = description.probe()
    if not probe.available:
        way_out = f"; {probe.install}" if probe.install else ""
        raise BackendError(f'backend "{name}" can\'t run here: {probe.reason}{way_out}')
    return description


def options_of(name: str) -> type:
    """The options class of the backend called `name`."""
    return describe(name).options


def backends_with_option(key: str) -> tuple[str, ...]:
    """Names of the built-in backends that have an option called `key`."""
    return tuple(name for name in BUILT_IN if key in attrs.fields_dict(options_of(name)))


def _built_in() -> Iterable[FoundBackend]:
    for name, value in BUILT_IN.items():
        entry_point = metadata.EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP)
        yield FoundBackend(name=name, package="quantune", version=quantune.__version__, entry_point=entry_point)


def _third_party(entry_points: Iterable[metadata.EntryPoint]) -> list[FoundBackend]:
    claims: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in entry_points:
        claims.setdefault(entry_point.name, []).append(entry_point)
    found = []
    for name, claimants in sorted(claims.items()):
        packages = sorted({_package(claim)[0] for claim in claimants})
        problem = None
        if name in BUILT_IN:
            problem = f"{', '.join(packages)} claims the name of a built-in backend"
        elif len(packages) > 1:
            problem = f"claimed by {' and '.join(packages)}; uninstall all but one"
        first = min(claimants, key=_package)
        version = _package(first)[1]
        if name in BUILT_IN:
            name = f"{name} ({packages[0]})"  # a row of its own: a built-in can't be shadowed
        found.append(FoundBackend(name=name, package=packages[0], version=version, entry_point=first, problem=problem))
    return found


def _package(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the package of an entry point; a damaged installation may have lost either."""
    if entry_point.dist is None:
        return "unknown", "?"
    found = entry_point.dist.metadata
    return found["Name"] if "Name" in found else "unknown", found["Version"] if "Version" in found else "?"


def _load(found: FoundBackend) -> BackendDescription:
    if found.problem:
        raise BackendError(f'backend "{found.name}" can\'t be used: {found.problem}')
    try:
        description = found.entry_point.load()
    except (
        Exception,
        SystemExit,
    ) as error:  # a plugin's import can raise anything; the person must learn which package it was
        raise BackendError(
            f'backend "{found.name}" of package {found.package} {found.version} can\'t be imported: '
            f"{type(error).__name__}: {error}. Reinstall or uninstall {found.package}"
        ) from error
    if not isinstance(description, BackendDescription):
        raise BackendError(
            f'backend "{found.name}" of package {found.package}: expected its entry point to be a BackendDescription, '
            f"found {type(description).__name__}"
        )
    if description.api_version != API_VERSION:
        raise BackendError(
            f'backend "{found.name}" of package {found.package} was written for version {description.api_version} of '
            f"the backend protocol, this quantune has version {API_VERSION}; update {found.package} or quantune"
        )
    if not attrs.has(description.options):
        raise BackendError(
            f'backend "{found.name}" of package {found.package}: expected its options to be an attrs class, '
            f"found {description.options!r}"
        )
    return description


def _listing(found: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(found))
