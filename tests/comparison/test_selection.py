"""Which formats there are to compare, by name."""

from __future__ import annotations

import pytest

from quantune.comparison.formats import select
from quantune.errors import InputError


def names(*only):
    return [format.name for format in select(only or None)]


def test_without_names_it_is_every_format_of_every_built_in_backend():
    assert names() == [
        *("bnb:nf4", "bnb:fp4", "bnb:int8"),
        *("torchao:int4", "torchao:nf4", "torchao:nvfp4", "torchao:int8", "torchao:fp8"),
        *("mxfp4", "fp8"),
    ]
    assert all(format.built_in and format.quantization for format in select())


def test_a_format_has_the_defaults_of_its_backend_written_out():
    (int4,) = select(["torchao:int4"])
    assert int4.quantization.backend == "torchao" and int4.quantization.options.group_size == 128


def test_a_backend_stands_for_all_its_formats_and_each_comes_once():
    assert names("fp8, bnb:int8", "bnb", "") == ["fp8", "bnb:int8", "bnb:nf4", "bnb:fp4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bnb:nf5", r'no format "bnb:nf5" \(did you mean "bnb:nf4"\?\). There are: bnb:nf4, bnb:fp4, bnb:int8, torch'),
        ("torchoa", r'did you mean "torchao"\?'),
        ("nf4", "There are: bnb:nf4"),
        ("mxfp4:e2m1", "mxfp4, fp8"),
        ("hqq", "pip install quantune-hqq brings hqq"),
        (",", "expected names of formats, found none"),
        ("[/]", r'no format "\[/\]"'),
    ],
)
def test_a_name_that_is_not_there_lists_those_that_are(name, message):
    with pytest.raises(InputError, match=message):
        select([name])
