"""The tiles of mining on coarse pixels, by GPU architecture and size of the problem."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .configs import TRITON


class CoarseTile(NamedTuple):
    """Numbers of maps that a program loads at once, its warps, stages of its pipeline, and most registers of a thread.

    Without a limit the compiler moves loads far ahead and takes all registers that there are.
    """

    elements: int
    warps: int
    stages: int
    registers: int | None = None


# Keyed by compute capability, 90 for 9.0; the kernels are compiled for no other. "fields" is the pass over the pyramid,
# which writes means and inner products. Any other key is the pass over windows of up to that many pixels; a second
# part, "reduced", marks a global view that needs a tile of its own, and "narrow" marks widths that allow no loads of 16
# bytes at once. None of them was tuned on a GPU.
COARSE_MINING = {
    90: {
        "fields": CoarseTile(4096, 4, 2),
        16: CoarseTile(2048, 2, 2, 128),
        # With 200 registers five programs reside on a multiprocessor, with more only four. Triton 3.8 would spill.
        64: CoarseTile(2048, 2, 2, 224 if TRITON >= (3, 8) else 200),
        256: CoarseTile(4096, 8, 2),
        (64, "reduced"): CoarseTile(2048, 2, 2),
        (16, "narrow"): CoarseTile(2048, 4, 2),
        (64, "narrow"): CoarseTile(2048, 4, 2),
        (256, "narrow"): CoarseTile(2048, 8, 1),
    },
}


def coarse_mining_tile(architecture: int | None, side: int | None, *, wide: bool, reduced: bool = False) -> CoarseTile:
    """The tile of the pass over windows of side x side pixels, or of that over the pyramid where side is None.

    Args:
        architecture: a key of COARSE_MINING; None, where nothing is compiled, stands for the first.
        wide: whether the levels' widths allow loads of 16 bytes at once.
        reduced: whether the map is a reduced one.
    """
    table = COARSE_MINING[next(iter(COARSE_MINING)) if architecture is None else architecture]
    if side is None:
        return table["fields"]
    key = next(pixels for pixels in (16, 64, 256) if side * side <= pixels)
    if not wide:
        return table[key, "narrow"]
    return (reduced and table.get((key, "reduced"))) or table[key]


def coarse_tiles(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, architecture: int | None
) -> list[CoarseTile]:
    """The tiles of the pass over the pyramid, and of each launch that pools."""
    side, views = pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2])), queries.shape[1]
    sides = [(None, False), (side, False), (side, True)][: 2 + (views > grid * grid)]
    wide = all(level.shape[-1] % 16 == 0 for level in pyramid)
    return [coarse_mining_tile(architecture, side, wide=wide, reduced=reduced) for side, reduced in sides]
