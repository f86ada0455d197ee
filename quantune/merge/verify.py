"""Whether a merged model answers as base + adapter answered when they were trained.

Both compute in fp32, so that what differs is their weights: the merged ones are rounded once to the dtype that they are
written in. How far such a rounding may move the answers of this very model is measured, not assumed: every weight of
the merged model is moved once more by a random amount of the same size, and the distance between the two is what one
rounding does. A right merge lies within a small multiple of that; a merge without the delta, with another scaling or
onto another base lies beyond it by orders of magnitude.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantune.comparison.outputs import Predictions, predict
from quantune.errors import VerificationError
from quantune.merge.answers import with_adapter, without_adapter
from quantune.merge.distance import Distance, distance, improvement_kept, mean_loss
from quantune.merge.prompts import Prompts

MARGIN = 4.0
"""How many times the measured effect of one more rounding is allowed. Right merges of the built-in model were between
0.4 and 1.5 times that effect, in bf16, fp16 and fp32; those without the adapter from 70 times upwards."""
ARITHMETIC = 16.0
"""Roundings of fp32 that two ways of computing the same in fp32 may differ by: an update that is added to the weights
and one that is added to the output are summed in another order."""
SEED = 0
MOVED_AT_ONCE = 1 << 24
"""Weights: 64 MiB of each of what is computed on the way."""


@attrs.frozen(kw_only=True)
class Verification:
    """What was found."""

    dtype: torch.dtype
    """What the merged weights are written in."""
    prompts: str
    """What the two were compared on."""
    found: Distance
    """Between base + adapter as trained and the merged model."""
    rounding: Distance
    """Between the merged model and itself after one more rounding of all weights."""
    adapter: Distance | None
    """Between base + adapter and the base alone: what a merge that lost the adapter would be off by."""
    targets: int
    """How many tokens the losses are about."""
    base_loss: float | None
    """Mean cross-entropy of the base alone over the target tokens, in nats; None where they are not the run's own, on
    which alone there is an improvement to speak of."""
    trained_loss: float
    """That of base + adapter."""
    loss: float
    """That of the merged model."""

    @property
    def kept(self) -> float | None:
        """The fraction of the adapter's improvement that the merged model has; None where there is none."""
        return None if self.base_loss is None else improvement_kept(self.base_loss, self.trained_loss, self.loss)

    @property
    def kl_bound(self) -> float:
        """The largest mean KL that one rounding of the weights explains, in nats."""
        return MARGIN * self.rounding.kl

    @property
    def difference_bound(self) -> float:
        """The largest difference of logits that one rounding of the weights explains."""
        return MARGIN * self.rounding.max_difference

    @property
    def passed(self) -> bool:
        """Whether the merged model is what was trained, as far as its dtype can say it."""
        return self.found.kl <= self.kl_bound and self.found.max_difference <= self.difference_bound

    @property
    def telling(self) -> bool:
        """Whether a merge without the adapter would have failed: not so where the adapter changes next to nothing."""
        return self.adapter is None or self.adapter.kl > self.kl_bound

    def problem(self) -> str | None:
        """Why the merged model is not what was trained; None if it is."""
        if self.passed:
            return None
        lost = ""
        if self.adapter is not None and 0.5 < self.found.kl / max(self.adapter.kl, 1e-300) < 2.0:
            lost = f", as far away as the base without the adapter ({self.adapter.kl:.1e})"
        name = str(self.dtype).removeprefix("torch.")
        return (
            "the merged model does not answer as base + adapter do: expected a KL of at most "
            f"{self.kl_bound:.1e} nats per token and logits within {self.difference_bound:.1e}, which rounding the "
            f"weights to {name} explains, found {self.found.kl:.1e} and {self.found.max_difference:.1e}{lost} "
            f"({self.found.tokens:,} tokens of {self.prompts})"
        )

    def require(self) -> None:
        """Require that the merged model is what was trained.

        Raises:
            VerificationError: it is not.
        """
        problem = self.problem()
        if problem is not None:
            raise VerificationError(problem)


def verify(
    reference: Callable[[], nn.Module],
    candidate: Callable[[], PreTrainedModel],
    prompts: Prompts,
    *,
    dtype: torch.dtype,
) -> Verification:
    """Compare base + adapter with the merged model, loading one after the other.

    Args:
        reference: loads base + adapter as trained, computing in fp32; a PEFT model or a plain one.
        candidate: loads the merged model in fp32.
        dtype: what its weights are written in.

    Raises:
        VerificationError: the merged model's answers are further away than a rounding of its weights explains.
    """
    verification = measure(reference, candidate, prompts, dtype=dtype)
    verification.require()
    return verification


def measure(
    reference: Callable[[], nn.Module],
    candidate: Callable[[], PreTrainedModel],
    prompts: Prompts,
    *,
    dtype: torch.dtype,
) -> Verification:
    """As `verify`, without judging."""
    expected, effect, base_loss = _reference(reference(), prompts)
    gc.collect()  # a model of transformers and PEFT refers to itself
    merged = candidate()
    predictions = with_adapter(merged, prompts.windows)
    found = distance(expected, predictions)
    trained_loss, loss = (mean_loss(it, prompts.tokens_N, prompts.targets_N) for it in (expected, predictions))
    del expected
    return Verification(
        dtype=dtype,
        prompts=prompts.source,
        found=found,
        rounding=_one_more_rounding(merged, predictions, dtype, prompts),
        adapter=effect,
        targets=int(prompts.targets_N.sum()),
        base_loss=base_loss if prompts.own else None,
        trained_loss=trained_loss,
        loss=loss,
    )


def _reference(model: nn.Module, prompts: Prompts) -> tuple[Predictions, Distance | None, float | None]:
    """What base + adapter predict, how far the base alone is from that, and its loss."""
    expected = with_adapter(model, prompts.windows)
    if not isinstance(model, PeftModel):
        return expected, None, None
    without = without_adapter(model, prompts.windows)
    return expected, distance(expected, without), mean_loss(without, prompts.tokens_N, prompts.targets_N)


def _one_more_rounding(
    model: PreTrainedModel, predictions: Predictions, dtype: torch.dtype, prompts: Prompts
) -> Distance:
    """How far `model`, whose `predictions` are at hand, moves with one more rounding of its weights, which it keeps."""
    output = model.get_output_embeddings()
    before = (
        {name: parameter.detach().clone() for name, parameter in output.named_parameters()}
        if output is not None
        else {}
    )
    move_weights(model, dtype)
    moved = predict(model, prompts.windows)

    def head(states: Tensor) -> Tensor:
        with _holding(output, before):
            return predictions.head(states)

    return distance(attrs.evolve(predictions, head=head), moved)


@torch.no_grad()
def move_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Move every weight by up to half a unit in its last place, were it of `dtype`: as far as rounding to it does.

    The amounts are random and the same in every call on one kind of device.
    """
    info, single = torch.finfo(dtype), torch.finfo(torch.float32)
    eps, smallest = max(info.eps, ARITHMETIC * single.eps), info.smallest_normal * info.eps
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(device=parameter.device).manual_seed(SEED)
        generator = generators[parameter.device]
        for part in parameter.view(-1).split(MOVED_AT_ONCE):
            _, exponent = torch.frexp(part)  # of a mantissa between 0.5 and 1
            unit = torch.ldexp(torch.full_like(part, eps), exponent - 1).clamp_min_(smallest)
            part.add_(torch.rand(part.shape, generator=generator, device=part.device).sub_(0.5).mul_(unit))


@contextlib.contextmanager
def _holding(module: nn.Module | None, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the parameters of `module` hold `tensors` while the context lasts."""
    parameters = {} if module is None else dict(module.named_parameters())
    outside = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = outside[name]
