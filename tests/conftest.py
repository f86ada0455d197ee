"""Shared by all tests: small models made on the spot, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that processes that share the tests end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Everything is imported, a million objects that never go; no collection is to look at them again."""
    gc.collect()
    gc.freeze()


def _begin_fork() -> None:
    gc.freeze()
    gc.enable()


# A forked process collects nothing that it was given. A process group that was used and destroyed before may live on
# in cycles; who collects it waits for threads that did not come along, or aborts. And looking for garbage among what
# was imported would copy all of its pages.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable, after_in_child=_begin_fork)


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The quickstart recipe."""
    return ROOT / "recipes" / "quickstart.toml"
