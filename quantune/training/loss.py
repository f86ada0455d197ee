"""Cross-entropy that never holds more logits than a chunk.

Shape suffixes: N target positions, D hidden size, V vocabulary.

Only the hidden states that have a target reach the output head. They pass through it in chunks; where the head is
frozen and its logits are used as they are, the gradient is computed in the forward pass, so that no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from quantune.data.collate import IGNORED

CHUNK_BYTES = 32 * 1024 * 1024
"""Bytes of logits held at a time; 32 to 64 MB measured fastest on CPUs."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
Loss = Callable[..., Tensor]
"""Sum of the cross-entropies of (input_ids, labels, the model's other arguments); the last may be left out."""


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies under logits = hidden @ W.T + b with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            logits = functional.linear(hidden_ND[rows], weight_VD, bias_V).float()
            target = labels_N[rows, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_normalizer - logits.gather(1, target)).sum()
            if grad_ND is not None:
                probabilities = logits.sub_(log_normalizer).exp_()
                probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
                torch.mm(probabilities.to(hidden_ND.dtype), weight_VD, out=grad_ND[rows])
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None, None


@attrs.frozen(kw_only=True, eq=False)
class LanguageModelLoss:
    """Computes a causal language model's loss from its backbone and output head, apart from each other."""

    backbone: nn.Module
    head: nn.Module
    finish: Callable[[Tensor], Tensor] | None
    """What the architecture does to the head's output (scaling, soft-capping); None for nothing."""

    def __call__(self, input_ids: Tensor, labels: Tensor, arguments: Mapping[str, Any] = NOTHING) -> Tensor:
        """The sum of the cross-entropies over all targets, fp32.

        `input_ids` and `labels`, both (batch, length) int64, are aligned: position i of the labels is predicted from
        the positions before it; labels of -100 are no targets. Padding stands at the right, where causal attention
        keeps it from every real token, so there is no attention mask. What packed rows need stands in `arguments`.
        """
        hidden_BLD = self.backbone(input_ids=input_ids, **arguments, use_cache=False).last_hidden_state
        targets_BL = labels[:, 1:]
        predicted = targets_BL != IGNORED
        hidden_ND, labels_N = hidden_BLD[:, :-1][predicted], targets_BL[predicted]
        if self.finish is None and isinstance(self.head, nn.Linear) and not self.head.weight.requires_grad:
            if self.head.weight.is_floating_point():
                return FrozenHeadLoss.apply(hidden_ND, self.head.weight, self.head.bias, labels_N)
        vocabulary = self._logits(hidden_ND[:1]).shape[-1]
        sums = [
            checkpoint(self._chunk_loss, hidden_ND[rows], labels_N[rows], use_reentrant=False)
            for rows in _chunks(hidden_ND.shape[0], vocabulary)
        ]
        if not sums:  # through the head all the same: where it is trained, every rank must have a gradient for it
            return self._logits(hidden_BLD[:, :1]).float().sum() * 0.0
        return torch.stack(sums).sum()

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return logits if self.finish is None else self.finish(logits)

    def _chunk_loss(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        return functional.cross_entropy(self._logits(hidden_ND).float(), labels_N, reduction="sum")


@attrs.frozen(kw_only=True, eq=False)
class WholeLogitsLoss:
    """The loss through the model's own forward, for architectures whose head can't be taken apart."""

    model: nn.Module

    def __call__(self, input_ids: Tensor, labels: Tensor, arguments: Mapping[str, Any] = NOTHING) -> Tensor:
        """As `LanguageModelLoss`."""
        logits = self.model(input_ids=input_ids, **arguments, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        predicted = targets != IGNORED
        return functional.cross_entropy(logits[predicted].float(), targets[predicted], reduction="sum")


def build_loss(model: PreTrainedModel, device: torch.device | None = None) -> LanguageModelLoss | WholeLogitsLoss:
    """The chunked loss if head(backbone(x)) gives the model's own logits, found out on a few tokens.

    `model` is the transformers model, with or without adapters in it. It computes on `device`, by default where its
    parameters are.
    """
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    if backbone is None or head is None or backbone is model:
        return WholeLogitsLoss(model=model)
    tokens = torch.arange(8, device=device or model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits
            raw = head(backbone(input_ids=tokens, use_cache=False).last_hidden_state)
            for finish in _finishes(model):
                found = raw if finish is None else finish(raw)
                if torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4):
                    return LanguageModelLoss(backbone=backbone, head=head, finish=finish)
    finally:
        model.train(training)
    return WholeLogitsLoss(model=model)


def _finishes(model: PreTrainedModel) -> list[Callable[[Tensor], Tensor] | None]:
    """What known architectures do to the logits, by the names their configurations use."""
    config = model.config.get_text_config()
    finishes: list[Callable[[Tensor], Tensor] | None] = []
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        finishes.append(lambda logits: torch.tanh(logits / cap) * cap)
    scale = getattr(config, "logit_scale", None)
    if scale:
        finishes.append(lambda logits: logits * scale)
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        finishes.append(lambda logits: logits / divisor)
    return [*finishes, None]  # last: where logits are small, a soft cap is hard to tell from nothing


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
