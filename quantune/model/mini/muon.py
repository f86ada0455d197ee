"""Muon in float32: momentum whose update is orthogonalized by a Newton-Schulz iteration (Jordan et al., 2024).

`torch.optim.Muon` iterates in bfloat16, which a CPU without AMX or AVX512-BF16 computes hundreds of times slower.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic coefficients of the reference implementation (https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(batch_NIO: Tensor, steps: int = 5) -> Tensor:
    """Return the matrices with their singular values pulled close to one; quickest where rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = batch_NIO / (batch_NIO.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for 2-D weights; same-shaped weights are orthogonalized in one batched product.

    The step of a weight is scaled by `0.2 * sqrt(max(rows, columns))`, which gives it the root mean square of an AdamW
    step (Liu et al., 2025, "Muon is scalable for LLM training"), so that one learning rate serves both optimizers.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: one step, one gradient
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                velocity = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(velocity, group["momentum"])
                # Wide orientation: the Gram matrix then has the smaller side.
                wide = update.mT if weight.shape[0] > weight.shape[1] else update
                by_shape[(wide.shape[0], wide.shape[1])].append((weight, wide))
            for (_, columns), pairs in by_shape.items():
                steps = orthogonalize(torch.stack([wide for _, wide in pairs])) * (0.2 * columns**0.5)
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    oriented = step.mT if weight.shape[0] > weight.shape[1] else step
                    weight.add_(oriented, alpha=-group["lr"])
