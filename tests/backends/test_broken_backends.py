"""The kit fails backends that are broken on purpose, each for its own reason, and passes the sound one."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import pytest

from quantune.testing.description_checks import DescriptionChecks

FILE = Path(__file__).parent / "broken_backends.py"
SLOW = ("its_description_imports_no_torch", "two_ranks_train_as_one_process")
"""Checks that start processes; tried on the backends that must fail them."""


@attrs.define
class Results:
    """A plugin of pytest that keeps what failed: for each backend, the checks and what they said.

    A broken description goes through the checks of descriptions, a broken format through all others.
    """

    failed: dict[str, dict[str, str]] = attrs.field(factory=dict)
    passed: dict[str, int] = attrs.field(factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        from broken_backends import BROKEN, DESCRIBED

        kept = []
        for item in items:
            check = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]  # a function of a class
            title = item.callspec.params["case"]  # type: ignore[attr-defined]  # as above
            item.user_properties.append((check, title))
            if title not in BROKEN:
                wanted = check not in SLOW
            elif check in SLOW or BROKEN[title].fails[0] in SLOW:
                wanted = check in BROKEN[title].fails
            else:
                described = hasattr(DescriptionChecks, "test_" + check)
                wanted = check in BROKEN[title].fails or described == (title in DESCRIBED)
            if wanted:
                kept.append(item)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ((check, title),) = report.user_properties
        if report.failed:
            self.failed.setdefault(title, {}).setdefault(check, report.longreprtext)
        elif report.when == "call":
            self.passed[title] = self.passed.get(title, 0) + 1


@pytest.fixture(scope="module")
def results():
    """What the kit says of every broken backend."""
    found = Results()
    done = pytest.main([str(FILE), "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"], plugins=[found])
    assert done == pytest.ExitCode.TESTS_FAILED
    return found


def broken():
    """The broken backends by title."""
    sys.path.insert(0, str(FILE.parent))
    from broken_backends import BROKEN

    return BROKEN


@pytest.mark.parametrize("title", broken())
def test_a_broken_backend_fails_for_its_own_reason(title, results):
    expected = broken()[title]
    failed = results.failed.get(title, {})
    wanted = {check for check in expected.fails if check is not ...}
    assert wanted <= failed.keys(), f"passed: {wanted - failed.keys()}"
    assert expected.says in failed[expected.fails[0]]
    if ... not in expected.fails:
        assert failed.keys() == wanted


def test_the_backend_they_come_from_passes(results):
    assert results.passed["sound"] > 30
    assert "sound" not in results.failed


def test_a_class_without_its_fixture_is_told_what_to_write(tmp_path):
    path = tmp_path / "test_mine.py"
    path.write_text(
        "from quantune.testing import BackendConformance\n\nclass TestMine(BackendConformance):\n    pass\n"
    )
    said = []

    class Plugin:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                said.append(report.longreprtext)

    pytest.main([f"{path}::TestMine::test_its_name_is_plain", "-q", "-p", "no:cacheprovider"], plugins=[Plugin()])
    assert said == [
        "TestMine lacks its fixture: write a method `case`, decorated with @pytest.fixture, that returns "
        "quantune.testing.Case(description=..., options=..., error=...)"
    ]
