"""The optimizers of nano's training, and the course of their rate."""

import math

import torch
from torch import nn

from .muon import Muon
from .stages import BRIDGE, TOWERS, TrainingStage

# Muon's rate, and its decay with it, is this many times AdamW's. It learned faster than at AdamW's own rate.
MUON = 3
BY_MUON = (*TOWERS, *BRIDGE, "language_model")


def make_optimizers(stage: TrainingStage, parts: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    """Makes AdamW, and Muon (Jordan et al. 2024) for the matrices of `BY_MUON`.

    The `times` of every group multiply the stage's rate.
    """
    betas, decay = ((0.9, 0.95), 0.1) if stage.told else ((0.9, 0.98), 0.01)
    plain, matrices = [], []
    for name, part in parts.items():
        times = 3 if name in stage.faster else 1
        tables = {m.weight for m in part.modules() if isinstance(m, nn.Embedding)}
        muon = [p for p in part.parameters() if name in BY_MUON and p.dim() == 2 and p not in tables]
        ours = set(muon)
        plain.append({"params": [p for p in part.parameters() if p not in ours], "times": times})
        if muon:
            matrices.append({"params": muon, "times": MUON * times})
    optimizers = [torch.optim.AdamW(plain, lr=stage.rate, betas=betas, weight_decay=decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=stage.rate, weight_decay=decay))
    return optimizers


def cosine(step: int, steps: int, *, least: float = 0.02) -> float:
    """The rate of a step as a share of the highest one: 3 % of the steps upwards, then a cosine down to `least`."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
