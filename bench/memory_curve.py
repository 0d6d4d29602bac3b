"""Memory of patch info mining against the picture's size, by formula: the large tensors that are held at the peak."""

import math

import torch

from .accounting import FLOAT32, Sizes
from .cases.settings import DIMS

# sides whose windows are whole; up to 768 one view, beyond it cells of at most 768 pixels and the global view, as in the published HD
SIDES = (384, 576, 768, 1152, 1536, 1728, 2304, 2688, 3072)
CELL = 768


def sizes_at(side: int, dtype: torch.dtype, batch: int = 1) -> Sizes:
    """A picture of so many pixels along a side."""
    grid = math.ceil(side / CELL)
    levels = tuple((side // 4 >> s, c) for s, c in enumerate(DIMS))
    return Sizes(dtype, batch, grid, grid**2 + (grid > 1), levels=levels)


def map_bytes(sizes: Sizes) -> int:
    """Stage maps, which the tower hands over."""
    return sizes.pyramid * sizes.dtype.itemsize


def reference_peak(sizes: Sizes) -> int:
    """Bytes above inputs and weights while the original's steps make the values of all cells' pixels.

    Then the merged map, the same cut into windows, and its norm are held, with keys and values of every pixel; in HD also the map
    reduced for the global view, in float32.
    """
    e, fine, c = sizes.dtype.itemsize, sizes.levels[0][0], sizes.channels
    pixels = sizes.batch * fine**2
    reduced = sizes.batch * (fine // sizes.grid) ** 2 * c * FLOAT32 if sizes.views > sizes.grid**2 else 0
    return pixels * (3 * c + 2 * sizes.dim) * e + reduced


def kernel_peak(sizes: Sizes) -> int:
    """Bytes above inputs and weights of our form with its kernel: absorbed and pooled queries, and windows' statistics or the next step."""
    absorbed = sizes.queries * sizes.channels * sizes.absorbed_itemsize
    pooled = sizes.queries * sizes.channels * max(sizes.dtype.itemsize, sizes.absorbed_itemsize)
    return absorbed + pooled + max(3 * sizes.queries * sizes.window**2 * FLOAT32, pooled)
