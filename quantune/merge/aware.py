"""Packing a merged model again with the adapter in view.

Packed again as any weight is, a merged weight mostly becomes the base's: an update smaller than half a step of the
format rounds to nothing. Nothing is trained here, but the codes of adapted layers are chosen for what the layers read,
measured on a few prompts, with more weight on the directions that the adapter reads (`quantune.merge.rounding`). How
much more is tried out: the packing whose answers are nearest to base + adapter's is kept, and plain packing is one of
those that are tried, so it is never worse on these prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from peft import PeftModel
from torch import Tensor, nn

from quantune.backends.backend import pack_weight
from quantune.backends.layout import PackedWeight
from quantune.comparison.outputs import predict
from quantune.comparison.text import Windows
from quantune.merge.answers import inner_model
from quantune.merge.distance import distance
from quantune.merge.rounding import emphasize, pack_for
from quantune.model.adapter import NAME
from quantune.model.lora_layer import QuantLoraLinear
from quantune.quantized.linear import QuantLinear

EMPHASES = (0.0, 100.0, 10_000.0)
"""What is tried beside plain packing, in multiples of the mean energy of an input. On the built-in model updates of
10 % of the weights want none, those of 0.5 % and less a large one."""
MOMENT_BYTES = 1 << 31
"""Second moments of inputs that are held at a time, at least one layer's; more layers take more passes."""


@attrs.frozen(kw_only=True, eq=False)
class AwarePacking:
    """The packed weights of the adapted layers, merged."""

    weights: Mapping[str, PackedWeight]
    """By module, on the CPU."""
    emphasis: float | None
    """Which of `EMPHASES` it was; None where plain packing was nearest."""
    kl: Mapping[float | None, float]
    """The KL from base + adapter for each that was tried, in nats per token, on the prompts they were chosen with."""


def pack_aware(
    model: PeftModel,
    merged: Callable[[str, Tensor], Tensor],
    windows: Windows,
    phase: Callable[[str], None] = lambda text: None,
) -> AwarePacking:
    """Choose codes for every packed linear layer that the adapter of `model` updates. The model stays as it is.

    Args:
        model: base + adapter as trained.
        merged: the merged weight in fp32, (out features, in features), from the name of a parameter of the base and its
            dequantized weight in fp32.
        windows: prompts, best of the training data: what is measured on must not be among them.
        phase: told what is being done.
    """
    model.eval()
    inner = inner_model(model)
    layers = {name: it for name, it in inner.named_modules() if isinstance(it, QuantLoraLinear)}
    if not layers:
        return AwarePacking(weights={}, emphasis=None, kl={})
    expected = predict(inner, windows)
    found: dict[float | None, float] = {}
    best: tuple[float | None, dict[str, PackedWeight]] = None, {}
    groups = list(_groups(layers))
    moments = second_moments(model, layers, windows) if len(groups) == 1 else None
    for emphasis in (None, *EMPHASES):
        phase("packing" if emphasis is None else f"choosing roundings, emphasis {emphasis:g}")
        packed = dict(_packed(model, groups, merged, windows, emphasis, moments))
        with _merged_into(layers, packed):
            found[emphasis] = distance(expected, predict(inner, windows)).kl
        if emphasis is None or found[emphasis] < found[best[0]]:
            best = emphasis, {name: PackedWeight(one.layout, one.data.cpu()) for name, one in packed.items()}
    return AwarePacking(weights=best[1], emphasis=best[0], kl=found)


@torch.no_grad()
def _packed(
    model: PeftModel,
    groups: Sequence[Mapping[str, QuantLoraLinear]],
    merged: Callable[[str, Tensor], Tensor],
    windows: Windows,
    emphasis: float | None,
    moments: Mapping[str, Tensor] | None,
) -> Iterator[tuple[str, PackedWeight]]:
    """The layers' merged weights, packed; `moments` are those of all layers, where they can be held at once."""
    for group in groups:
        inputs = moments if moments is not None or emphasis is None else second_moments(model, group, windows)
        for name, layer in group.items():
            base = layer.get_base_layer()
            assert isinstance(base, QuantLinear)
            backend, options = base.weight_format.backend, base.weight_format.layout.options
            wanted_OI = merged(f"{name}.weight", base.dequantize(torch.float32))
            packed = pack_weight(backend, wanted_OI.to(base.weight_format.layout.dtype), options, name=name)
            if emphasis is not None and inputs is not None and name in inputs:  # not if no prompt gets there
                moment_II = emphasize(inputs[name], _directions(layer), emphasis)
                packed = pack_for(backend, packed, wanted_OI, moment_II)
            yield name, packed


def _directions(layer: QuantLoraLinear) -> Tensor:
    """What the layer's adapters read of their input, shape (R, I)."""
    found: list[Any] = [layer.lora_A[name] for name in layer.active_adapters if name in layer.lora_A]
    return torch.cat([lora_A.weight for lora_A in found])


def _groups(layers: Mapping[str, QuantLoraLinear]) -> Iterator[dict[str, QuantLoraLinear]]:
    """The layers in turn, as many at a time as their moments may take memory; at least one."""
    group: dict[str, QuantLoraLinear] = {}
    held = 0
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        nbytes = 4 * base.in_features**2
        if group and held + nbytes > MOMENT_BYTES:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += nbytes
    if group:
        yield group


@torch.no_grad()
def second_moments(model: nn.Module, layers: Mapping[str, nn.Module], windows: Windows) -> dict[str, Tensor]:
    """The mean of x x^T over the inputs x of each layer, fp32 (in features, in features)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            product = x_TI.T @ x_TI
            sums[name] = sums[name].add_(product) if name in sums else product
            counts[name] = counts.get(name, 0) + len(x_TI)

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        predict(inner_model(model), windows)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.div_(counts[name]) for name, total in sums.items()}


class _merged_into:
    """Let layers compute with merged weights in place of base and adapter."""

    def __init__(self, layers: Mapping[str, QuantLoraLinear], packed: Mapping[str, PackedWeight]) -> None:
        self.layers = layers
        self.packed = packed
        self.before: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            weight = _weight(layer)
            self.before[name] = weight.data
            weight.data = self.packed[name].data.to(weight.device)
            layer.merged_adapters.append(NAME)

    def __exit__(self, *error: object) -> None:
        for name, layer in self.layers.items():
            _weight(layer).data = self.before[name]
            layer.merged_adapters.clear()


def _weight(layer: QuantLoraLinear) -> nn.Parameter:
    base: Any = layer.get_base_layer()
    return base.weight
