"""What an author says about a backend to have it checked, and the backend ready to be checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from quantune.backends.backend import Backend, pack_weight
from quantune.backends.description import BackendDescription
from quantune.backends.layout import PackedLayout, PackedWeight
from quantune.quantized.linear import QuantLinear, WeightFormat, Workspace
from quantune.testing.failing import expecting_no_error
from quantune.testing.weights import KINDS, make_weight

Shape = tuple[int, int]


def _kinds(instance: Any, attribute: Any, value: Mapping[str, float]) -> None:
    unknown = sorted(set(value) - set(KINDS))
    if unknown:
        raise ValueError(f"Case.errors: expected kinds among {', '.join(KINDS)}, found {', '.join(unknown)}")


def _below_one(instance: Any, attribute: Any, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"Case.error: expected a bound from 0 to less than 1, which zeros would keep, found {value}")


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """One format to check: a backend with options, and how well it keeps weights."""

    description: BackendDescription
    """The object that the entry point names."""
    options: Any
    """Options of the format, as a recipe would give them."""
    error: float = attrs.field(validator=_below_one)
    """The relative error that weights come back with, at most: the norm of the difference over the norm of the weight.
    State what a normal distribution gives, with a few percent to spare."""
    errors: Mapping[str, float] = attrs.field(factory=dict, validator=_kinds)
    """Other bounds for the kinds of weights (`quantune.testing.weights.KINDS`) that the format can't keep `error` for.
    Subnormal weights may become zeros without being named here."""
    shapes: tuple[Shape, ...] = ((64, 256), (96, 512))
    """Shapes (out features, in features) that the format stores; at least one."""
    awkward_shapes: tuple[Shape, ...] = ((1, 1), (3, 70), (7, 64), (5, 33), (65, 130), (129, 160), (2, 1000))
    """Shapes that the format stores or refuses with a QuantizationError."""
    ulps: int = 0
    """Representable numbers by which a result in bf16 or fp16 may differ from the fp32 result rounded; 1 where the
    format computes in that dtype."""

    def bound(self, kind: str) -> float:
        """The relative error allowed for a kind of weight."""
        return self.errors.get(kind, 1.0 if kind == "subnormal" else self.error)

    def resolved_options(self) -> Any:
        """The options with every default written out, as quantune uses them."""
        return self.options.resolved() if hasattr(self.options, "resolved") else self.options


@attrs.frozen(kw_only=True, eq=False)
class Subject:
    """The backend of a case, loaded, with shorthands whose failures name what the author wrote."""

    case: Case
    backend: Backend
    options: Any
    devices: tuple[str, ...]
    """Device types to check on: those it runs on and there are."""

    @property
    def device(self) -> str:
        """Where checks that don't depend on the device run."""
        return self.devices[0]

    @property
    def shape(self) -> Shape:
        """Where checks that don't depend on the shape look."""
        return self.case.shapes[0]

    def weight(
        self, shape: Shape | None = None, dtype: torch.dtype = torch.float32, kind: str = "normal", seed: int = 0
    ) -> Tensor:
        """A weight on the device of the checks."""
        return make_weight(shape or self.shape, dtype, kind, seed).to(self.device)

    def layout(self, shape: Shape, dtype: torch.dtype = torch.float32) -> PackedLayout:
        """The layout of a weight."""
        with expecting_no_error(f"inner_tensors({shape}, {self.options})", "A shape of Case.shapes must be stored."):
            return self.backend.layout(shape, dtype, self.options)

    def pack(self, weight: Tensor) -> PackedWeight:
        """The weight, packed as loading packs it."""
        what = f"packing a {weight.dtype} weight of shape {tuple(weight.shape)}"
        with expecting_no_error(what, "pack must return the tensors that inner_tensors says, for every finite weight."):
            return pack_weight(self.backend, weight, self.options)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The dense weight, in whatever the backend returned."""
        what = f"dequantize to {dtype} {'into out' if out is not None else 'without out'} on {packed.data.device.type}"
        with expecting_no_error(what, "It must work for fp32, bf16 and fp16, with out and without."):
            return self.backend.dequantize(packed, dtype, out)

    def layer(self, packed: PackedWeight, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> QuantLinear:
        """A linear layer over packed bytes."""
        return layer_of(self.backend, packed, bias=bias, dtype=dtype)


def layer_of(
    backend: Backend, packed: PackedWeight, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    """A linear layer over packed bytes, its bias zeros."""
    out_features, in_features = packed.layout.shape
    layer = QuantLinear(
        in_features,
        out_features,
        bias=bias,
        weight_format=WeightFormat(backend, packed.layout, Workspace()),
        compute_dtype=dtype,
        device=packed.data.device,
    )
    layer.weight.data = packed.data.clone()
    if bias:
        layer.bias.data.zero_()
    return layer
