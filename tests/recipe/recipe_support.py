"""A valid recipe as text, and what the loader makes of it or says about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
import pytest

from quantune.errors import BackendError, RecipeError
from quantune.recipe.load import load_recipe

VALID = """\
[model]
base = "builtin:mini"

[quantization]
backend = "toy"
weight_dtype = "nf4"

[adapter]
r = 8
targets = ["q_proj", "v_proj"]

[[data.train]]
path = "train.jsonl"
format = "chat"

[training]
max_steps = 10
learning_rate = 1e-3
"""


@attrs.frozen(kw_only=True)
class ToyOptions:
    """Options of a backend that exists only here, so that the recipe language is tested apart from real ones."""

    weight_dtype: Literal["nf4", "fp4", "int8"] = "nf4"
    """How a weight is stored."""
    block_size: int | None = None
    """Weights that share one scale."""
    double_quant: bool | None = None
    """Whether the scales are quantized too."""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight_dtype == "int8":
            for key in ("block_size", "double_quant"):
                if getattr(self, key) is not None:
                    yield key, f'{key} has no meaning for weight_dtype = "int8"'
        elif self.block_size not in (None, 32, 64):
            yield "block_size", f"expected one of 32, 64, found {self.block_size}"

    def resolved(self) -> ToyOptions:
        if self.weight_dtype == "int8":
            return self
        double_quant = True if self.double_quant is None else self.double_quant
        return attrs.evolve(self, block_size=self.block_size or 64, double_quant=double_quant)


def options_of(backend: str) -> type:
    if backend == "toy":
        return ToyOptions
    if backend == "hqq":
        raise BackendError("backend hqq is not installed: pip install quantune-hqq")
    raise BackendError(f'expected one of the backends "toy", found "{backend}"')


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def load(path, overrides=()):
    return load_recipe(path, options_of=options_of, overrides=overrides).recipe


def problems(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems
