"""AdamW and Muon for the painter, whose matrices are mostly the weights of convolutions."""

from collections.abc import Sequence

import torch
from torch import nn

from ..muon import Muon

# Muon's rate is this many times AdamW's, as in nano's own training.
MUON = 3


class FlatMuon(Muon):
    """Muon (Jordan et al. 2024) for matrices, and for weights of convolutions seen as matrices [out, in * kernel].

    Args:
        weights: parameters of two or more dimensions, contiguous, on the device on which they stay.
        options: those of `Muon`.
    """

    def __init__(self, weights: Sequence[nn.Parameter], **options):
        self._weights = list(weights)
        # The views share the memory of the weights, so a step changes both.
        self._views = [weight.detach().flatten(1).requires_grad_() for weight in self._weights]
        super().__init__(self._views, **options)

    @torch.no_grad()
    def step(self) -> None:
        for weight, view in zip(self._weights, self._views):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()


def make_optimizers(modules: Sequence[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for tables, norms, biases and what has few channels; Muon for the other weights.

    Each group of parameters says under `times` how many times the rate it learns at.
    """
    tables = {m.weight for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    weights = [p for module in modules for p in module.parameters()]
    matrices = [p for p in weights if p.dim() >= 2 and p not in tables and min(len(p), p.shape[1]) > 8]
    ours = set(matrices)
    plain = [{"params": [p for p in weights if p not in ours], "times": 1}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(plain, rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        muon = FlatMuon(matrices, lr=MUON * rate, weight_decay=0.01)
        muon.param_groups[0]["times"] = MUON
        optimizers.append(muon)
    return optimizers
