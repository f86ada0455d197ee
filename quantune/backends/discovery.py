"""Which installed packages claim to bring a backend, from their metadata alone.

`importlib.metadata` reads the entry points of all packages at once, so that one damaged file hides every other package.
Here each package is read by itself: a damaged one costs its own row and nothing else. Whatever a package says of itself
is made fit for one line of a terminal before it leaves this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import metadata

import attrs

from quantune.backends.description import ENTRY_POINT_GROUP
from quantune.errors import BackendError

NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
VALUE = re.compile(r"[\w.]+\s*:\s*[\w.]+\s*(\[.*\])?")
LONGEST_NAME = 40
LONGEST_MESSAGE = 400


@attrs.frozen(kw_only=True)
class Claim:
    """One line of a package's entry points: a name, and where its description is."""

    name: str
    """Fit for printing; a usable name is as it stands in the package."""
    value: str
    """`module:attribute`."""
    package: str
    version: str
    problem: str | None = None
    """Why it can't be used."""


def claims() -> list[Claim]:
    """What the installed packages claim, in the order of `sys.path`; imports none of them."""
    found: list[Claim] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        key = _folder_name(distribution)[0]
        if key and key in seen:  # a package further back on the path, which Python would not import either
            continue
        seen.add(key)
        found += _claims_of(distribution)
    return found


def require_readable_packages() -> None:
    """Require that `importlib.metadata` can read all entry points; torch and transformers do so when imported.

    Raises:
        BackendError: it can't, and so neither library can be imported; names the damaged packages.
    """
    try:
        metadata.entry_points()
        return
    except Exception as error:  # whatever the file made the parser raise
        failure = error
    damaged = []
    for distribution in metadata.distributions():
        try:
            list(distribution.entry_points)
        except Exception:  # as above; the message names the package
            damaged.append(_package(distribution)[0])
    names = ", ".join(sorted(set(damaged))) or "a package"
    raise BackendError(
        f"the entry_points.txt of {names} is damaged ({in_words(failure)}), and as long as it is, Python can import "
        f"neither torch nor transformers. Reinstall or uninstall {names}"
    ) from failure


def plain(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text with everything that a terminal would act on written out (`\\x1b`), and not too long."""
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


def in_words(error: BaseException) -> str:
    """An exception of someone else's code on one line: its type and what it says."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # an exception whose own text fails
        said = "(its message can't be read)"
    return plain(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def _claims_of(distribution: metadata.Distribution) -> Iterable[Claim]:
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        if ENTRY_POINT_GROUP.encode() in error.object:
            yield _damaged(distribution, error)
        return
    except OSError as error:
        yield _damaged(distribution, error)
        return
    if ENTRY_POINT_GROUP not in text:
        return
    package, version = _package(distribution)
    sound = True
    for name, value in _entries(text):
        problem = _problem(name, value)
        sound = sound and problem is None
        yield Claim(
            name=plain(name, LONGEST_NAME),
            value=value or "",
            package=package,
            version=version,
            problem=problem,
        )
    if sound:
        try:
            list(distribution.entry_points)
        except Exception as error:  # whatever the file made the parser raise
            yield _damaged(distribution, error)


def _entries(text: str) -> Iterable[tuple[str, str | None]]:
    """Name and value of each line of our section; no value where the line has no `=`."""
    section = None
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif section == ENTRY_POINT_GROUP:
            name, equals, value = line.partition("=")
            yield name.strip(), value.strip() if equals else None


def _problem(name: str, value: str | None) -> str | None:
    if not NAME.fullmatch(name):
        return (
            f'"{plain(name, LONGEST_NAME)}" is no name for a backend: expected a lower-case letter, then at most '
            f"{LONGEST_NAME - 1} lower-case letters, digits, - or _"
        )
    if value is None or not VALUE.fullmatch(value):
        line = name if value is None else f"{name} = {value}"
        return f'expected "{name} = module:attribute" in its entry_points.txt, found "{plain(line, 80)}"'
    return None


def _damaged(distribution: metadata.Distribution, error: Exception) -> Claim:
    """A claim that stands for a whole package."""
    package, version = _package(distribution)
    problem = f"the entry_points.txt of {package} can't be read: {in_words(error)}; reinstall or uninstall {package}"
    return Claim(name=f"({package})", value="", package=package, version=version, problem=problem)


def _package(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version of a package; its folder's where a damaged installation has lost them."""
    folder_name, folder_version = _folder_name(distribution)
    try:
        found = distribution.metadata
        name = found["Name"] if "Name" in found else None
        version = found["Version"] if "Version" in found else None
    except Exception:  # no METADATA, or one that is no text: the folder has to do
        name = version = None
    shown = plain(name or folder_name or "unknown", LONGEST_NAME), plain(version or folder_version or "?", 20)
    return shown


def _folder_name(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name (normalized) and version as the folder of the metadata spells them, empty where it doesn't."""
    folder = os.path.basename(str(getattr(distribution, "_path", "")))  # the one attribute that is not public
    stem, _, suffix = folder.rpartition(".")
    if suffix not in ("dist-info", "egg-info"):
        return "", ""
    name, _, version = stem.partition("-")
    return re.sub(r"[-_.]+", "-", name).lower(), version.partition("-py")[0]
