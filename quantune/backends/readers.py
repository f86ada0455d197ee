"""Readers: how other libraries load packed weights from a checkpoint.

A backend whose format another library reads returns a `Reader` from `Backend.reader`. The reader says what tensors a
weight becomes, what `config.json` and the headers of the safetensors files say of them, and which weights the library
does not take, so that everything is known before anything is written.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from quantune.backends.backend import Backend
from quantune.backends.layout import PackedLayout, PackedWeight


@attrs.frozen(kw_only=True)
class Destination:
    """Where a packed weight is to be stored."""

    name: str
    """The parameter's name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`."""
    shape: tuple[int, int]
    """(out features, in features); of one expert, where there is a stack of them."""
    dtype: torch.dtype
    """Dtype of the checkpoint, which is what the library computes in."""
    expert: bool = False
    """Whether it belongs to fused experts."""
    stacked: bool = False
    """Whether the checkpoint stores all experts of a layer in one tensor."""
    model_type: str
    """The architecture, as `config.json` names it."""


@attrs.frozen(kw_only=True)
class Reader(abc.ABC):
    """How a library reads one format of a backend."""

    library: ClassVar[str]
    """Who reads it, e.g. `transformers with bitsandbytes`."""
    model_names: ClassVar[bool] = False
    """Whether the library finds weights by their names in the model, also where the checkpoint has others."""

    backend: Backend
    """The backend that packs the weights."""
    options: Any
    """Its options, every default written out."""

    @abc.abstractmethod
    def quantization_config(self, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        """What `config.json` says under `quantization_config`.

        Args:
            kept: names of the linear layers that stay in full precision.
            dtype: what the library computes in.
        """

    def refusal(self, destination: Destination) -> str | None:
        """Why the library does not take this weight packed, to follow its name and a colon; None where it does."""
        return None

    def tensors(self, name: str, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors to store for the weight called `name`, by their full names."""
        names = self.backend.checkpoint_names(name)
        return {names[part]: tensor for part, tensor in self.backend.export(packed).items()}

    def stacked_tensors(self, name: str, experts: Sequence[PackedWeight]) -> dict[str, Tensor]:
        """The tensors to store for all experts of a layer under `name`; their first dimension is the experts."""
        each = [self.tensors(name, packed) for packed in experts]
        return {key: torch.stack([tensors[key] for tensors in each]) for key in each[0]}

    def metadata(self, layouts: Mapping[str, PackedLayout], others: Iterable[str]) -> dict[str, str]:
        """What the header of each safetensors file says.

        Args:
            layouts: of every packed weight of the checkpoint, by its name.
            others: names of the tensors that are stored as they are.
        """
        return {}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as checkpoints write it, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")
