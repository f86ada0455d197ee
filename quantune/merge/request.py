"""What is to be merged, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import attrs
import torch

from quantune.errors import InputError
from quantune.merge.trained import TrainedAdapter
from quantune.merge.verify import Verification
from quantune.merge.weights import Onto
from quantune.recipe.schema import AdapterConfig, ModelConfig, QatConfig, QuantizationConfig, Recipe

SPLITTING = ("pissa", "olora", "loftq")
"""Initializations that change the base."""
WRITTEN_IN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The values of `--dtype`."""


class Observer(Protocol):
    """Is told how a merge goes on."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def begin(self, nbytes: int) -> None:
        """So many bytes will be written."""

    def wrote(self, nbytes: int) -> None:
        """So many more are written."""

    def note(self, text: str) -> None:
        """Something that the person may want to know."""

    def warning(self, text: str) -> None:
        """Something that the person should know."""


@attrs.frozen(kw_only=True)
class Setting:
    """What an adapter was trained on, as far as it matters to its weights."""

    model: ModelConfig
    quantization: QuantizationConfig | None
    adapter: AdapterConfig | None
    """None for an adapter of another tool."""
    seed: int
    precision: str
    """`fp32`, `bf16`, or `auto` where nobody says."""
    qat: QatConfig | None = None
    """What was rounded in training."""

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        """That of a run."""
        return cls(
            model=recipe.model,
            quantization=recipe.quantization,
            adapter=recipe.adapter,
            seed=recipe.training.seed,
            precision=recipe.training.precision,
            qat=recipe.training.qat,
        )

    @classmethod
    def of_another_tool(cls, adapter: TrainedAdapter, base: str | None) -> Setting:
        """That of an adapter whose folder holds no recipe: the base as it is.

        Raises:
            InputError: nobody says which base that is.
        """
        named = base or adapter.base_named()
        if named is None:
            raise InputError(
                f"the adapter in {adapter.folder} does not say which base it was trained on; name it with --base"
            )
        return cls(model=ModelConfig(base=named), quantization=None, adapter=None, seed=0, precision="fp32")


def require_one_setting(settings: Sequence[Setting], weights: Sequence[float]) -> Setting:
    """What all adapters, each times its weight, were trained on.

    Raises:
        InputError: it is not the same for all, or one of them is only itself when it is whole and alone.
    """
    first = settings[0]
    for other in settings[1:]:
        for name in ("model", "quantization", "precision"):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"expected adapters that were trained on the same base in the same way, found another [{name}] for "
                    "two of them; merge each alone"
                )
    if list(weights) == [1.0]:
        return first
    if any(one.qat is not None for one in settings):
        raise InputError(
            "adapters can't be weighed or added up where one was trained with [training.qat], which rounds its sum "
            "with the base; merge it alone, without a weight"
        )
    if any(one.adapter is not None and one.adapter.init in SPLITTING for one in settings):
        raise InputError(
            "adapters can be weighed and added up where all began at zero, and one began with a share of the base "
            f"(init = {', '.join(SPLITTING)}); merge it alone, without a weight"
        )
    return first


@attrs.frozen(kw_only=True)
class MergeRequest:
    """What is to be merged, and how."""

    adapters: tuple[TrainedAdapter, ...]
    weights: tuple[float, ...]
    """What each adapter's update is multiplied with."""
    setting: Setting
    recipe: Recipe | None = None
    """That of the first adapter's run, whose data merged models are tried on."""
    out: Path
    onto: Onto = "dequantized"
    dtype: torch.dtype | None = None
    """What weights are written in; None for what the base has them in."""
    max_shard_size: str | None = None
    force: bool = False
    """Merge although the base is not the one that was trained on."""
    overwrite: bool = False
    aware: bool = False
    """Onto packed: choose the roundings for what the layers read, see `quantune.merge.aware`."""
    verify: bool | None = None
    """Compare the merged model with base and adapter; None where that is cheap enough."""
    trust_remote_code: bool = False


@attrs.frozen(kw_only=True)
class MergeResult:
    """A merged checkpoint."""

    folder: Path
    merged: int
    """Weights that the adapter changed."""
    dequantized: int
    """Weights that are only what packing made of them."""
    packed: int
    """Weights that are packed as they were trained on, with nothing added."""
    kept: int
    """Tensors that are as they were."""
    nbytes: int
    seconds: float
    dtype: str
    exact: bool
    """Whether it must answer as base and adapter did, but for the rounding to its dtype."""
    verification: Verification | None
    """What comparing it with base and adapter gave; None where they were not compared."""
