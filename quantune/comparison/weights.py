"""The packed weights of a model: how far they are from the original ones, and how long dequantizing them takes.

Shape suffixes: E matrices (one of a linear layer, one per expert of a fused stack), B bytes, O out, I in features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from quantune.comparison.rows import DequantizeFigures, LayerFigures
from quantune.errors import QuantizationError
from quantune.model.load import packed_weights
from quantune.quantized.linear import WeightFormat

MIN_ROUNDS = 3
MAX_ROUNDS = 50
MIN_SECONDS = 0.4
"""Dequantizing is timed for at least so long, rounds permitting."""


@attrs.frozen(kw_only=True, eq=False)
class PackedParameter:
    """A parameter that holds packed matrices."""

    name: str
    """As in the unquantized model, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    weight_format: WeightFormat
    data_EB: Tensor
    """dtype uint8."""
    transposed: bool
    """Whether the unquantized model keeps its matrices as (E, I, O)."""

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return len(self.data_EB) * math.prod(self.weight_format.layout.shape)


def packed_parameters(model: nn.Module) -> Iterator[PackedParameter]:
    """Every packed parameter of a model, stacks of experts included."""
    for name, module in model.named_modules():
        for leaf, weight_format in packed_weights(module).items():
            yield PackedParameter(
                name=f"{name}.{leaf}",
                weight_format=weight_format,
                data_EB=module.get_parameter(leaf).detach().view(-1, weight_format.layout.nbytes),
                transposed=leaf != "weight" and bool(getattr(module, "is_transposed", False)),
            )


def kind_of(parameter: str) -> str:
    """The kind of layer that a parameter belongs to: its name without what tells one block's from another's.

    >>> kind_of("model.layers.3.self_attn.q_proj.weight")
    'q_proj'
    >>> kind_of("model.layers.3.mlp.experts.down_proj")
    'experts.down_proj'
    """
    parts = parameter.split(".")
    if parts[-1] == "weight":
        parts.pop()
        return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    return ".".join(parts[-2:])


@attrs.define
class Sums:
    """Layers added up."""

    layers: int = 0
    weights: int = 0
    nbytes: int = 0
    error: float = 0.0
    """Squares of the errors."""
    signal: float = 0.0
    """Squares of the original weights."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))

    def figures(self, kind: str) -> LayerFigures:
        """The sums as they are reported.

        Raises:
            QuantizationError: the original weights are all zero, and the stored ones are not.
        """
        if self.error and not self.signal:
            raise QuantizationError(f"{kind}: weights that are all zero are dequantized to something else")
        relative = math.sqrt(self.error / self.signal) if self.signal else 0.0
        return LayerFigures(
            kind=kind, layers=self.layers, weights=self.weights, nbytes=self.nbytes, relative_error=relative
        )


@torch.no_grad()
def packed_sums(parameters: Iterable[PackedParameter], dense: Mapping[str, Tensor]) -> dict[str, Sums]:
    """What the packed parameters are next to the original ones, by kind of layer.

    Args:
        dense: the parameters of the unquantized model by name, on any device.

    Raises:
        QuantizationError: a parameter dequantizes to NaN or infinity, or is not of the original one's shape.
    """
    kinds: dict[str, Sums] = {}
    for parameter in parameters:
        error = signal = 0.0
        for data_B, original in zip(parameter.data_EB, _original(parameter, dense), strict=True):
            original_OI = original.to(data_B.device, torch.float32)
            error += power(parameter.weight_format.dequantize(data_B, torch.float32) - original_OI)
            signal += power(original_OI)
        if not math.isfinite(error):
            raise QuantizationError(f"{parameter.name} is dequantized to NaN or infinity")
        kind = kind_of(parameter.name)
        kinds[kind] = kinds.get(kind, Sums()) + Sums(1, parameter.weights, parameter.data_EB.nbytes, error, signal)
    return kinds


def dense_sums(weights: Mapping[str, Tensor]) -> dict[str, Sums]:
    """Unquantized weights next to themselves, by kind of layer."""
    kinds: dict[str, Sums] = {}
    for name, weight in weights.items():
        kind = kind_of(name)
        kinds[kind] = kinds.get(kind, Sums()) + Sums(1, weight.numel(), weight.nbytes)
    return kinds


@torch.no_grad()
def time_dequantize(parameters: Sequence[PackedParameter], dtype: torch.dtype) -> DequantizeFigures:
    """Dequantize every packed parameter as a forward pass does, and copy as many dense weights, in turns.

    Both are repeated for a moment and the best round counts, because other processes only ever make one slower.
    """
    device = parameters[0].data_EB.device
    largest = max(math.prod(parameter.weight_format.layout.shape) for parameter in parameters)
    source = torch.ones(largest, dtype=dtype, device=device)
    target = torch.zeros_like(source)

    def dequantize() -> None:
        for parameter in parameters:
            for data_B in parameter.data_EB:
                parameter.weight_format.borrow(data_B, dtype)

    def copy() -> None:
        for parameter in parameters:
            count = math.prod(parameter.weight_format.layout.shape)
            for _ in parameter.data_EB:
                target[:count].copy_(source[:count])

    dequantize()  # the first time fills tables and the workspace
    times: list[tuple[float, float]] = []
    while len(times) < MIN_ROUNDS or (len(times) < MAX_ROUNDS and sum(map(sum, times)) < MIN_SECONDS):
        times.append((_seconds(dequantize, device), _seconds(copy, device)))
    best, copied = (min(column) for column in zip(*times, strict=True))
    millions = sum(parameter.weights for parameter in parameters) / 1e6
    return DequantizeFigures(ms_per_million=1e3 * best / millions, memcpys=best / copied)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _original(parameter: PackedParameter, dense: Mapping[str, Tensor]) -> Tensor:
    """The original matrices, shape (E, O, I)."""
    expected = (len(parameter.data_EB), *parameter.weight_format.layout.shape)
    weight = dense.get(parameter.name)
    matrices = None if weight is None or weight.dim() < 2 else weight.reshape(-1, *weight.shape[-2:])
    if matrices is not None and parameter.transposed:
        matrices = matrices.mT
    if matrices is None or matrices.shape != expected:
        found = None if matrices is None else tuple(matrices.shape)
        raise QuantizationError(
            f"{parameter.name}: expected {expected} weights in the unquantized model, found {found}"
        )
    return matrices


def power(values: Tensor) -> float:
    """The sum of the squares, in fp64: those of large weights leave fp32's range."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
