"""Choosing the codes of a packed weight so that its outputs, not its weights, are nearest to what is wanted.

Shape suffixes: O out features, I in features, C codes in the order of their values, R directions.

Rounding each weight to the nearest code takes no account of the others. Here a row's weights are rounded one after the
other, and what each one was rounded off is made up for by those that follow, as far as the inputs let them: GPTQ
(arXiv:2210.17323), with the inputs of largest energy first. Scales stay those that the backend's own packing chose, so
what comes out is a weight of the same format.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import attrs
import torch
from torch import Tensor

from quantune.backends.backend import Backend
from quantune.backends.layout import PackedWeight

DAMPING = 0.01
"""Added to the energy of every input, as a fraction of the mean: inputs that were not seen are not free."""
TOGETHER = 128
"""Columns whose errors are passed on to the rest of the weight at once."""


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Grid:
    """The values that each weight can take: one of `values` times its scale plus its offset."""

    values_C: Tensor
    """fp32, ascending."""
    codes_C: Tensor
    """uint8: the code of each."""
    scale_IO: Tensor
    """A row for each input: weights are rounded input by input."""
    offset_IO: Tensor

    def nearest(self, wanted_O: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The codes, uint8, and the values nearest to what the weights of an input should be, both (O,)."""
        scale_O, offset_O = self.scale_IO[column], self.offset_IO[column]
        relative_O = torch.where(scale_O == 0, 0.0, (wanted_O - offset_O) / scale_O)
        index_O = torch.bucketize(relative_O, self.middles_C)
        return self.codes_C[index_O], self.values_C[index_O] * scale_O + offset_O

    @functools.cached_property
    def middles_C(self) -> Tensor:
        """Where the nearest value changes, one less than there are values."""
        return (self.values_C[1:] + self.values_C[:-1]) / 2


def grid_of(backend: Backend, packed: PackedWeight) -> Grid | None:
    """The grid of a packed weight, found by dequantizing two codes; None where the format has none."""
    found = backend.element_values(packed.layout.options)
    if found is None:
        return None
    order = sorted((value, code) for code, value in enumerate(found) if math.isfinite(value))
    distinct = [pair for before, pair in zip([(math.nan, 0), *order], order, strict=False) if before[0] != pair[0]]
    by_size = sorted(distinct, key=lambda pair: abs(pair[0]))
    (small, small_code), (large, large_code) = by_size[0], by_size[-1]
    device = packed.data.device

    def all_of(code: int) -> Tensor:
        codes_OI = torch.full(packed.layout.shape, code, dtype=torch.uint8, device=device)
        return backend.dequantize(with_codes(backend, packed, codes_OI), torch.float32)

    small_OI = all_of(small_code)
    scale_OI = (all_of(large_code) - small_OI) / (large - small)
    return Grid(
        values_C=torch.tensor([value for value, _ in distinct], device=device),
        codes_C=torch.tensor([code for _, code in distinct], dtype=torch.uint8, device=device),
        scale_IO=scale_OI.T.contiguous(),
        offset_IO=(small_OI - small * scale_OI).T.contiguous(),
    )


def with_codes(backend: Backend, packed: PackedWeight, codes_OI: Tensor) -> PackedWeight:
    """The packed weight with other element codes."""
    layout = packed.layout
    return PackedWeight(layout, layout.write(backend.with_elements(packed, codes_OI)))


def choose_codes(wanted_OI: Tensor, grid: Grid, moment_II: Tensor) -> Tensor:
    """Codes, uint8 (O, I), whose outputs are near to those of `wanted_OI`.

    Args:
        wanted_OI: the weight in full precision.
        moment_II: how much errors count: the mean over inputs x of x x^T, fp32 or fp64.
    """
    energy_I = moment_II.diagonal()
    order = torch.argsort(energy_I, descending=True, stable=True)
    ordered_II = moment_II[order][:, order].double()
    damping = DAMPING * float(energy_I.mean()) or 1.0  # without any input: plain rounding
    ordered_II.diagonal().add_(damping)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(ordered_II))
    passed_on_II = torch.linalg.cholesky(inverse_II, upper=True).float()
    passed_on_II /= passed_on_II.diagonal()[:, None].clone()
    left_IO = wanted_OI.T[order].float()
    codes_IO = torch.empty(left_IO.shape, dtype=torch.uint8, device=wanted_OI.device)
    columns = order.tolist()
    for start in range(0, len(columns), TOGETHER):
        stop = min(start + TOGETHER, len(columns))
        errors_IO = torch.empty_like(left_IO[start:stop])
        for place in range(start, stop):
            codes_IO[columns[place]], values_O = grid.nearest(left_IO[place], columns[place])
            error_O = left_IO[place] - values_O
            errors_IO[place - start] = error_O
            left_IO[place:stop].addr_(passed_on_II[place, place:stop], error_O, alpha=-1)
        left_IO[stop:].addmm_(passed_on_II[start:stop, stop:].T, errors_IO, alpha=-1)
    return codes_IO.T.contiguous()


def emphasize(moment_II: Tensor, directions_RI: Tensor, emphasis: float) -> Tensor:
    """The moment with more weight on the inputs that an adapter reads.

    Args:
        directions_RI: the rows of its A.
        emphasis: energy added to them, in multiples of the mean energy of an input.
    """
    basis_IR = torch.linalg.qr(directions_RI.T.to(moment_II))[0]
    return moment_II + emphasis * moment_II.diagonal().mean() * (basis_IR @ basis_IR.T)


def pack_for(backend: Backend, packed: PackedWeight, wanted_OI: Tensor, moment_II: Tensor) -> PackedWeight:
    """A weight packed again with codes chosen for its inputs; as it is where its format has no grid."""
    grid: Any = grid_of(backend, packed)
    return packed if grid is None else with_codes(backend, packed, choose_codes(wanted_OI, grid, moment_II))
