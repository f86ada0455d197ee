"""The tiny backend is one that quantune can rely on."""

import pytest
from quantune_tiny import TinyOptions, description

from quantune.testing import BackendConformance, Case

FORMATS = {
    "int8": Case(description=description, options=TinyOptions(), error=0.015, errors={"outliers": 0.05}),
    "int4": Case(
        description=description, options=TinyOptions(weight_dtype="int4"), error=0.12, errors={"outliers": 0.15}
    ),
}


class TestTiny(BackendConformance):
    @pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
    def case(self, request):
        return request.param
