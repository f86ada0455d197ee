"""What a run was made of: versions, hardware, hashes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import quantune
from quantune.checkpoint.commit import file_hash

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "safetensors", "tokenizers", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONHASHSEED")
"""Environment variables that change results; nothing else of the environment is written anywhere."""


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
    """sha256 by file name."""
    return {path.name: file_hash(path) for path in sorted(paths)}
