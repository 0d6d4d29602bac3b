"""Memory against the picture's size, by formula: the large tensors that are held at the peak of mining, and of a
picture's way to tokens.

All above weights; of a GPU, where our form of the tower makes its expansions in chunks of another size than on a CPU.
"""

import math

import torch

from mg_fast.modules.convnext_channels_last import GPU_EXPANSION

from .accounting import FLOAT32, Sizes
from .cases.settings import DEPTHS, DIMS, LR, WIDTH
from .cases.towers import LAYERS

# sides whose windows are whole; up to 768 one view, beyond it cells of at most 768 pixels and the global view, as in
# the published HD
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

    Then the merged map, the same cut into windows, and its norm are held, with keys and values of every pixel; in HD
    also the map reduced for the global view, in float32.
    """
    e, fine, c = sizes.dtype.itemsize, sizes.levels[0][0], sizes.channels
    pixels = sizes.batch * fine**2
    reduced = sizes.batch * (fine // sizes.grid) ** 2 * c * FLOAT32 if sizes.views > sizes.grid**2 else 0
    return pixels * (3 * c + 2 * sizes.dim) * e + reduced


def kernel_peak(sizes: Sizes) -> int:
    """Bytes above inputs and weights of our form with its kernel: absorbed and pooled queries, and windows' statistics
    or the next step.
    """
    absorbed = sizes.queries * sizes.channels * sizes.absorbed_itemsize
    pooled = sizes.queries * sizes.channels * max(sizes.dtype.itemsize, sizes.absorbed_itemsize)
    return absorbed + pooled + max(3 * sizes.queries * sizes.window**2 * FLOAT32, pooled)


def _pixel_bytes(sizes: Sizes) -> int:
    """Both towers' pixels as the processor makes them, and as the towers take them."""
    pixels = sizes.batch * 3 * ((4 * sizes.levels[0][0]) ** 2 + sizes.views * LR**2)
    return pixels * (FLOAT32 + (sizes.dtype.itemsize if sizes.dtype != torch.float32 else 0))


def _finest_bytes(sizes: Sizes) -> int:
    n, c = sizes.levels[0]
    return sizes.batch * n * n * c * sizes.dtype.itemsize


def reference_picture_peak(sizes: Sizes) -> int:
    """Of the tower as timm runs it, which holds eleven maps of its first stage, or of mining beside the stage maps."""
    return _pixel_bytes(sizes) + max(11 * _finest_bytes(sizes), map_bytes(sizes) + reference_peak(sizes))


def kernel_picture_peak(sizes: Sizes) -> int:
    """Of our form: the tower holds three maps and an expansion of four or of a chunk."""
    finest = _finest_bytes(sizes)
    return _pixel_bytes(sizes) + max(3 * finest + min(4 * finest, GPU_EXPANSION), map_bytes(sizes) + kernel_peak(sizes))


def packed_bytes(dtype: torch.dtype) -> int:
    """What the packed towers hold beside the model's own weights: contractions and convolutions of ConvNeXt-L, q, k and
    v of CLIP.
    """
    blocks = sum(depth * (4 * c * c + 49 * c) for c, depth in zip(DIMS, DEPTHS))
    between = sum(4 * before * after for before, after in zip(DIMS, DIMS[1:]))
    return (blocks + between + (LAYERS - 1) * 3 * WIDTH**2) * dtype.itemsize
