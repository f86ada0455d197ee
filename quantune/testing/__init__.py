"""A conformance kit for authors of backends, run by pytest.

    from quantune.testing import BackendConformance, Case
    from quantune_mine import MineOptions, description


    class TestMine(BackendConformance):
        @pytest.fixture
        def case(self):
            return Case(description=description, options=MineOptions(), error=0.01)

It checks what quantune relies on: that the description is one and imports no torch, that weights come back within the
stated error, that the bytes of a weight are the same every time and mean the same wherever they lie, and that layers,
merging, adopting, saving and two ranks work over them. Every failure says what to change. docs/plugins.md walks through
it.
"""

from __future__ import annotations

try:
    import pytest as _pytest  # noqa: F401  # the one module of quantune that needs it
except ImportError as error:
    raise ImportError(
        "quantune.testing runs under pytest, which is not installed; pip install pytest (or 'quantune[test]')"
    ) from error

from quantune.testing.case import Case
from quantune.testing.conformance import BackendConformance

__all__ = ["BackendConformance", "Case"]
