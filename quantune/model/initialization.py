"""Initializations of an adapter that look at the weight, or at what packing it loses.

The base is split before it is packed: W = scaling * B A + R, and R is what gets packed. The adapter begins as B A, so
base and adapter together begin where the base was.

pissa   B A holds the r largest singular values of W (arXiv:2404.02948).
olora   B A is the first r columns and rows of W's QR decomposition (arXiv:2406.01775).
loftq   B A comes closest to what packing R loses, and R = W - scaling * B A, in turns (arXiv:2310.08659).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import attrs
import torch
from torch import Tensor

from quantune.recipe.schema import AdapterConfig

RoundTrip = Callable[[Tensor], Tensor]
"""Packs a weight and dequantizes it, fp32."""

FULL_SVD_UP_TO = 1024
"""Above this many rows or columns singular vectors come from subspace iteration, which is far cheaper."""
OVERSAMPLING, POWER_ITERATIONS = 8, 16


@attrs.frozen(kw_only=True, eq=False)
class Factors:
    """The update that an adapter begins with, scaling * B A."""

    lora_A: Tensor
    """(r, in features), fp32."""
    lora_B: Tensor
    """(out features, r), fp32."""

    def on_cpu(self) -> Factors:
        """The same in the CPU's memory."""
        return Factors(lora_A=self.lora_A.cpu(), lora_B=self.lora_B.cpu())


@attrs.frozen(kw_only=True, eq=False)
class Initialization:
    """Splits the weights of the adapted layers while the base is loaded, and keeps the adapter's share."""

    method: Literal["pissa", "olora", "loftq"]
    r: int
    scaling: float
    iterations: int
    """`loftq`: how often packing and fitting take turns."""
    seed: int
    names: frozenset[str]
    """The adapted layers."""
    factors: dict[str, Factors] = attrs.field(factory=dict)
    """By layer, once its weight was split."""
    dense_digests: dict[str, str] = attrs.field(factory=dict)
    """sha256 of what is left of layers that are not packed; the bytes of packed ones have a fingerprint anyway."""

    def split(self, name: str, weight: Tensor, round_trip: RoundTrip | None) -> Tensor:
        """What is left of `weight`, (out features, in features), for the base; its dtype stays.

        `round_trip` is None for a layer that is not packed: there packing loses nothing, and `loftq` has nothing to do.
        """
        if name not in self.names or (self.method == "loftq" and round_trip is None):
            return weight
        dense = weight.float()
        with _one_thread():
            if self.method == "loftq":
                assert round_trip is not None
                rest, factors = self._loftq(name, dense, weight.dtype, round_trip)
            else:
                factors = self._olora(dense) if self.method == "olora" else self._principal(name, dense)
                rest = dense - self.update_of(factors)
        self.factors[name] = factors
        rest = rest.to(weight.dtype)
        if round_trip is None:
            self.dense_digests[name] = hashlib.sha256(rest.cpu().view(torch.uint8).numpy().data).hexdigest()
        return rest

    def _loftq(self, name: str, weight: Tensor, dtype: torch.dtype, round_trip: RoundTrip) -> tuple[Tensor, Factors]:
        rest = weight
        for turn in range(self.iterations):
            lost = weight - round_trip(rest.to(dtype))
            factors = self._principal(name, lost)
            if turn + 1 < self.iterations:
                rest = weight - self.update_of(factors)
        return rest, factors

    def _olora(self, weight: Tensor) -> Factors:
        orthogonal, upper = torch.linalg.qr(weight)
        return self._filled_up(upper[: self.r], orthogonal[:, : self.r])

    def _principal(self, name: str, matrix: Tensor) -> Factors:
        """The best update of rank r for `matrix`, its singular values shared out evenly between A and B."""
        if min(matrix.shape) <= FULL_SVD_UP_TO:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed ^ zlib.crc32(name.encode()))  # alike whatever was loaded before
                rank = min(self.r + OVERSAMPLING, *matrix.shape)
                left, values, right_columns = torch.svd_lowrank(matrix, q=rank, niter=POWER_ITERATIONS)
            right = right_columns.mH
        roots = (values[: self.r] / self.scaling).sqrt()
        return self._filled_up(roots[:, None] * right[: self.r], left[:, : self.r] * roots)

    def _filled_up(self, lora_A: Tensor, lora_B: Tensor) -> Factors:
        """The factors with zeros up to rank r, where the matrix itself has a smaller one."""
        missing = self.r - len(lora_A)
        if missing > 0:
            lora_A = torch.cat([lora_A, lora_A.new_zeros(missing, lora_A.shape[1])])
            lora_B = torch.cat([lora_B, lora_B.new_zeros(lora_B.shape[0], missing)], dim=1)
        return Factors(lora_A=lora_A.contiguous(), lora_B=lora_B.contiguous())

    def update_of(self, factors: Factors) -> Tensor:
        """The share of a weight that the adapter takes, (out features, in features), fp32."""
        return self.scaling * (factors.lora_B @ factors.lora_A)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Singular vectors have other last bits with another number of threads, and a resumed run needs the same base."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def initialization(config: AdapterConfig, names: Iterable[str], *, seed: int) -> Initialization | None:
    """The initialization that a recipe asks for; None where the adapter begins at zero.

    `names` are the layers that `config.targets` covers.
    """
    if config.init not in ("pissa", "olora", "loftq"):
        return None
    return Initialization(
        method=config.init,  # type: ignore[arg-type]  # narrowed above
        r=config.r,
        scaling=config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        iterations=config.loftq_iterations,
        seed=seed,
        names=frozenset(names),
    )
