"""Checks of one value each."""

import math

import pytest

from quantune.recipe.checks import at_least, between, finite, not_empty, patterns, positive, positive_or_auto


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (positive, -3, "must be greater than 0, found -3"),
        (positive, 0, "must be greater than 0, found 0"),
        (positive, True, "must be greater than 0, found true"),
        (positive, math.nan, "must be greater than 0, found nan"),
        (positive_or_auto, 0, "must be greater than 0, found 0"),
        (finite, math.inf, "must be finite, found inf"),
        (finite, math.nan, "must be finite, found nan"),
        (at_least(2), 1, "must be at least 2, found 1"),
        (at_least(0), True, "must be at least 0, found true"),
        (at_least(0), math.nan, "must be at least 0, found nan"),
        (between(0, 1), 1.5, "must be at least 0 and at most 1, found 1.5"),
        (between(0, 1), True, "must be at least 0 and at most 1, found true"),
        (between(0, 1), math.nan, "must be at least 0 and at most 1, found nan"),
        (between(0, 1, right_open=True), 1.0, "must be at least 0 and less than 1, found 1.0"),
        (not_empty, "  ", "must not be empty"),
        (not_empty, (), "must not be empty"),
        (patterns, ("a", ""), "must not hold an empty name"),
    ],
)
def test_a_refusal_says_what_is_right_and_what_was_found(check, value, message):
    with pytest.raises(ValueError) as caught:
        check(None, None, value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (positive, math.inf),
        (positive_or_auto, "auto"),
        (finite, 10**400),
        (at_least(2), 2),
        (between(0, 1), 1),
        (between(0, 1, right_open=True), 0),
        (not_empty, "x"),
        (patterns, "x"),
    ],
)
def test_the_ends_of_a_range_are_in_it(check, value):
    check(None, None, value)
