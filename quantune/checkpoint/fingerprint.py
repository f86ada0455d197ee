"""What a run was made of: versions, hardware, hashes. Nothing here imports what it names."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import quantune
from quantune.checkpoint.commit import file_hash

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "safetensors", "tokenizers", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONHASHSEED")
"""Environment variables that change results; nothing else of the environment is written anywhere."""
LONGEST = 80
"""Characters of a value that a sentence shows."""


def environment() -> dict[str, Any]:
    """Versions, machine, and the environment variables that change results."""
    versions = {"quantune": quantune.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """sha256 by file name.

    Raises:
        ValueError: two of the files have the same name, so that one would hide the other.
        OSError: a file can't be read.
    """
    hashes: dict[str, str] = {}
    for path in sorted(paths):
        if path.name in hashes:
            raise ValueError(f"expected files of different names, found two called {path.name}, one of them {path}")
        hashes[path.name] = file_hash(path)
    return hashes


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str = "") -> list[str]:
    """A sentence for each value that is not what it was, named by its path, e.g. `versions.torch was 2.12, is 2.13`.

    Args:
        saved: JSON values, e.g. the manifest beside a checkpoint.
        now: the same of this process.
        where: the path that the names begin with.
    """
    found: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        name = f"{where}.{key}" if where else key
        if key not in now:
            found.append(f"{name} was {_short(saved[key])}, is not there now")
        elif key not in saved:
            found.append(f"{name} was not there, is {_short(now[key])}")
        elif isinstance(saved[key], Mapping) and isinstance(now[key], Mapping):
            found.extend(differences(saved[key], now[key], where=name))
        elif saved[key] != now[key]:
            found.append(f"{name} was {_short(saved[key])}, is {_short(now[key])}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
