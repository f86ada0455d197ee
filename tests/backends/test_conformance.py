"""Every built-in format passes the conformance kit that authors of backends use."""

from __future__ import annotations

import pytest

from quantune.backends import bnb, fp8, mxfp4, torchao
from quantune.backends.bnb import BnbOptions
from quantune.backends.fp8 import Fp8Options
from quantune.backends.mxfp4 import Mxfp4Options
from quantune.backends.torchao import TorchaoOptions
from quantune.testing import BackendConformance, Case

BNB, TORCHAO = bnb.description, torchao.description


def bnb_case(error, outliers, **options):
    return Case(description=BNB, options=BnbOptions(**options), error=error, errors={"outliers": outliers})


def torchao_case(error, outliers, tiny=None, **options):
    errors = {"outliers": outliers} | ({} if tiny is None else {"tiny": tiny})
    return Case(description=TORCHAO, options=TorchaoOptions(**options), error=error, errors=errors)


CASES = {
    "bnb-nf4": bnb_case(0.1, 0.1),
    "bnb-nf4-256-single": bnb_case(0.11, 0.11, block_size=256, double_quant=False),
    "bnb-fp4": bnb_case(0.125, 0.125, weight_dtype="fp4"),
    "bnb-int8": bnb_case(0.01, 0.015, weight_dtype="int8"),
    "torchao-int4": torchao_case(0.105, 0.17, weight_dtype="int4"),
    "torchao-int4-32": torchao_case(0.1, 0.125, weight_dtype="int4", group_size=32),
    "torchao-nf4": torchao_case(0.1, 0.1, weight_dtype="nf4", tiny=0.2),
    "torchao-nvfp4": torchao_case(0.1, 0.1, weight_dtype="nvfp4"),
    "torchao-int8": torchao_case(0.01, 0.015, weight_dtype="int8", tiny=1.0),  # its scales are at least 1e-7
    "torchao-int8-64": torchao_case(0.01, 0.011, weight_dtype="int8", group_size=64, tiny=1.0),
    "torchao-fp8": torchao_case(0.03, 0.03, weight_dtype="fp8"),
    "mxfp4": Case(description=mxfp4.description, options=Mxfp4Options(), error=0.15),
    "fp8": Case(description=fp8.description, options=Fp8Options(), error=0.03),
    "fp8-48x80": Case(description=fp8.description, options=Fp8Options(block_size=(48, 80)), error=0.03),
}


class TestBuiltIn(BackendConformance):
    @pytest.fixture(params=CASES.values(), ids=CASES.keys())
    def case(self, request):
        return request.param
