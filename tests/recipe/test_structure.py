"""Options classes of other packages are structured as strictly as the recipe itself."""

from typing import Literal

import attrs
import pytest

from quantune.recipe.structure import structure


@attrs.frozen(kw_only=True)
class Options:
    bits: Literal[2, 4, 8] = 4
    axis: Literal[0, 1, "auto"] = 1
    sizes: tuple[int, ...] = ()
    names: list[str] = attrs.field(factory=list)
    scale: float | None = None


def test_literals_of_whole_numbers_and_lists_of_numbers_are_understood():
    options, findings = structure(Options, {"bits": 8, "axis": 0, "sizes": [1, 2], "names": ["a"], "scale": 2})
    assert findings == []
    assert options == Options(bits=8, axis=0, sizes=(1, 2), names=["a"], scale=2.0)
    assert isinstance(options.scale, float)


@pytest.mark.parametrize(
    ("given", "where", "message"),
    [
        ({"bits": 3}, "bits", "expected one of 2, 4, 8, found 3 (a whole number)"),
        ({"bits": "4"}, "bits", 'expected one of 2, 4, 8, found "4" (a string)'),
        ({"bits": 4.0}, "bits", "expected one of 2, 4, 8, found 4.0 (a number)"),
        ({"axis": True}, "axis", 'expected one of 0, 1, "auto", found true (a boolean)'),
        ({"names": "abc"}, "names", 'expected a list of strings, found "abc" (a string)'),
        ({"sizes": [1, 2.5]}, "sizes[1]", "expected a whole number, found 2.5 (a number)"),
        ({"scale": "2"}, "scale", 'expected a number, found "2" (a string)'),
    ],
)
def test_nothing_is_coerced(given, where, message):
    options, (finding,) = structure(Options, given)
    assert options is None
    assert (finding.where, finding.message) == (where, message)


def test_every_wrong_element_of_a_list_is_found():
    _, findings = structure(Options, {"names": [1, "a", 2], "sizes": ["x"]})
    assert [finding.where for finding in findings] == ["sizes[0]", "names[0]", "names[2]"]
