"""The reference in docs/ is the docstrings of the fields, all of them."""

from pathlib import Path
from typing import Literal

import attrs
import pytest

from quantune.backends.registry import BUILT_IN, options_of
from quantune.recipe import schema
from quantune.recipe.reference import field_docs, render

ROOT = Path(__file__).parents[2]
CLASSES = [value for value in vars(schema).values() if isinstance(value, type) and attrs.has(value)]


@pytest.mark.parametrize("cls", [*CLASSES, *(options_of(name) for name in BUILT_IN)])
def test_every_field_is_documented(cls):
    assert {field.name for field in attrs.fields(cls)} <= field_docs(cls).keys()


def test_the_reference_in_docs_is_up_to_date():
    rendered = render({name: options_of(name) for name in BUILT_IN})
    assert (ROOT / "docs" / "recipe.md").read_text() == rendered, "run `make docs`"


@pytest.mark.parametrize("cls", [*CLASSES, *(options_of(name) for name in BUILT_IN)])
def test_every_key_is_a_row_of_the_reference(cls):
    page = render({name: options_of(name) for name in BUILT_IN})
    keys = [field.name for field in attrs.fields(cls) if field.name != "options"]
    titles = [f"`[{key}]`" if cls is schema.Recipe else f"| `{key}` |" for key in keys]
    if cls is schema.DataConfig:
        titles = [title for title, key in zip(titles, keys, strict=True) if key not in ("train", "eval")]
    if cls is schema.ModelConfig:
        titles[keys.index("special_tokens")] = "`[model.special_tokens]`"
    if cls is schema.TrainingConfig:
        titles[keys.index("qat")] = "`[training.qat]`"
    assert [title for title in titles if title not in page] == []


@attrs.frozen(kw_only=True)
class Common:
    bits: Literal[4, 8] = 4
    """How many bits
    a weight has."""


@attrs.frozen(kw_only=True)
class Options(Common):
    """Options of a backend of another package."""

    names: tuple[str, ...] = attrs.field(factory=tuple)
    """Some | names."""
    bare: int = 1


def test_options_of_other_packages_are_rendered_with_what_they_inherit():
    page = render({"other": Options})
    assert '## `[quantization] with backend = "other"`' in page
    assert "| `bits` | `4` or `8` | `4` | How many bits a weight has. |" in page
    assert "| `names` | list of strings | `[]` | Some \\| names. |" in page
    assert "| `bare` | integer | `1` |  |" in page


def test_the_reference_needs_no_backends():
    assert "with backend" not in render()
