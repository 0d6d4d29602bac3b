"""The optimizer Muon in float32.

`torch.optim.Muon` rounds to bfloat16. A CPU without instructions for it takes several times as long for such products
(`mg_fast.runtime.cpu_dtype`).
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

# The coefficients and the number of the iterations are those of Jordan et al. 2024.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The share of the running mean that a step keeps.
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: a step is nearly orthogonal, and close to a running mean of gradients.

    It is `torch.optim.Muon` with Nesterov's momentum and `adjust_lr_fn="match_rms_adamw"`, but in float32, and
    matrices of one shape go through the iterations together.

    Args:
        params: matrices, or groups of them as every optimizer of torch takes them.
        lr: the rate, for which the size of a step is that of AdamW.
        weight_decay: the share of the rate by which weights decay in a step.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        if shapes:
            raise ValueError(f"Muon: expected matrices, got a parameter of shape {shapes[0]}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, alike in by_shape.items():
                moves = orthogonal(torch.stack([self._mean(p) for p in alike]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, move in zip(alike, moves):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-rate)

    def _mean(self, p: nn.Parameter) -> torch.Tensor:
        """The running mean of the gradients, with the newest one counted once more, as Nesterov's momentum does."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = state["momentum_buffer"]
        mean.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(mean, MOMENTUM)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The matrices [n, a, b] with all singular values near one, by the iteration of Newton and Schulz."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide
