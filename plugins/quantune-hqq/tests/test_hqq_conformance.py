"""Every format passes the conformance kit for backends."""

import pytest
from quantune.testing import BackendConformance, Case

from quantune_hqq import HqqOptions, description

ERROR = {"int8": 0.0055, "int4": 0.09, "int3": 0.19, "int2": 0.45}
"""What a normal distribution gives, and a few percent."""


class TestHqq(BackendConformance):
    @pytest.fixture(params=ERROR)
    def case(self, request):
        errors = {"constant": 5e-4, "outliers": max(ERROR[request.param], 0.009)}
        options = HqqOptions(weight_dtype=request.param)
        return Case(description=description, options=options, error=ERROR[request.param], errors=errors)


class TestHqqInGroupsOf32(BackendConformance):
    two_ranks = False  # as above: the group size changes nothing there

    @pytest.fixture
    def case(self):
        options = HqqOptions(weight_dtype="int3", group_size=32, iterations=5)
        return Case(description=description, options=options, error=0.18, shapes=((64, 256), (7, 96)))
