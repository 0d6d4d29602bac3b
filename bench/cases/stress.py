"""Shapes that no published model has. They show where the kernels are slow, or fail first."""

import torch

from ..costs.mining import Sizes
from ..registry import Case
from .patch_mining import mining_case


def cases() -> list[Case]:
    sizes = {
        # The kernel takes windows of at most 16 x 16 pixels.
        "window16-b1": Sizes(torch.bfloat16, levels=((384, 192), (192, 384), (96, 768), (48, 1536))),
        # The rows of these widths are no multiple of 16 bytes, so that loads are narrow.
        "unaligned-b1": Sizes(torch.bfloat16, levels=((192, 100), (96, 202), (48, 404), (24, 806))),
        # Many pictures at once.
        "768-b32": Sizes(torch.bfloat16, batch=32),
    }
    return [
        mining_case(f"stress/patch_mining-{name}-bfloat16", size, devices=("cuda",)) for name, size in sizes.items()
    ]
