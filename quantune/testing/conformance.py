"""The conformance class: all checks, over the one fixture that an author writes."""

from __future__ import annotations

import pytest
import torch

from quantune.backends.backend import Backend
from quantune.testing.case import Case, Subject
from quantune.testing.description_checks import DescriptionChecks
from quantune.testing.failing import expecting_no_error, require
from quantune.testing.format_checks import FormatChecks
from quantune.testing.reader_checks import ReaderChecks
from quantune.testing.use_checks import UseChecks


class BackendConformance(DescriptionChecks, FormatChecks, UseChecks, ReaderChecks):
    """Subclass it, name the subclass `Test...`, and give it a fixture `case` that returns a `Case`.

    A fixture with `params` checks several formats. `two_ranks = False` leaves out the one slow check (about 10 seconds
    for the first format, a second for each other one).
    """

    @pytest.fixture
    def case(self) -> Case:
        """What to check; overridden by the author."""
        pytest.fail(
            f"{type(self).__name__} lacks its fixture: write a method `case`, decorated with @pytest.fixture, "
            "that returns quantune.testing.Case(description=..., options=..., error=...)",
            pytrace=False,
        )

    @pytest.fixture
    def subject(self, case: Case) -> Subject:
        """The backend, loaded; skips where it can't run."""
        with expecting_no_error("probe()", "It must say with Probe(available=False, reason=...) what is missing."):
            probe = case.description.probe()
        if not probe.available:
            pytest.skip(f"{case.description.name} can't run here: {probe.reason}")
        with expecting_no_error("load()", "It must import the tensor code and return the backend."):
            backend = case.description.load()
        require(
            isinstance(backend, Backend),
            f"load() must return an instance of a subclass of quantune.backends.backend.Backend, found {backend!r}",
        )
        options = case.resolved_options()
        devices = probe.devices_of.get(getattr(options, "weight_dtype", ""), probe.devices)
        present = tuple(device for device in devices if device != "cuda" or torch.cuda.is_available())
        if not present:
            pytest.skip(f"{case.description.name} runs on {', '.join(devices)}, which this machine lacks")
        return Subject(case=case, backend=backend, options=options, devices=present)
