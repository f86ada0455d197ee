"""Splits and slices mean what they mean in the datasets library."""

import datasets
import pytest

from quantune.recipe.slices import parse_split

SLICES = [
    "train",
    "train[:20%]",
    "train[20%:]",
    "train[-10%:]",
    "train[33%:66%]",
    "train[:-25%]",
    "train[1:3]",
    "train[2:]",
    "train[-2:]",
    "train[:-1]",
    "train[5:2]",
    "train[:1000]",
    "train[:]",
    "train[-1%:]",
]


@pytest.mark.parametrize("text", SLICES)
@pytest.mark.parametrize("count", [0, 1, 3, 7, 10, 1001])
def test_a_slice_holds_the_rows_that_the_datasets_library_reads(text, count):
    begin, end = parse_split(text).bounds(count)
    (expected,) = datasets.ReadInstruction.from_spec(text).to_absolute({"train": count})
    assert range(begin, end) == range(expected.from_, expected.to)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train[:20%", "expected a split such as"),
        ("train[10]", "expected a split such as"),
        ("train[a:b]", "expected a split such as"),
        ("train[:1.5%]", "expected a split such as"),
        ("train[:5]+test", "expected a split such as"),
        ("", "expected a split such as"),
        ("train[10%:20]", "rows or percents, found both"),
        ("train[:120%]", "at most 100%"),
    ],
)
def test_what_is_no_slice_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse_split(text)


def test_only_shares_and_slices_from_the_end_need_the_number_of_rows():
    needing = {text for text in SLICES if parse_split(text).needs_count}
    assert needing == {text for text in SLICES if "%" in text or "-" in text}
