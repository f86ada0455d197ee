"""Shared by all tests: small models made on the spot, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The quickstart recipe."""
    return ROOT / "recipes" / "quickstart.toml"
