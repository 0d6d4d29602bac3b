"""Peak memory on a GPU against the size of the picture: the large tensors that are held at once, in bytes.

The peaks are above inputs and weights. Each function takes the sizes of mining, from which the sizes of both towers
follow.
"""

import torch

from mg_fast.modules.convnext_channels_last import GPU_EXPANSION
from mg_fast.ops.torch.pointwise import EXTRA

from ..cases.settings import DEPTHS, DIMS, LAYERS, LR, WIDTH
from .mining import Sizes
from .operators import FLOAT32

# Sides of pictures whose windows are whole.
SIDES = (384, 576, 768, 1152, 1536, 1728, 2304, 2688, 3072)


def map_bytes(sizes: Sizes) -> int:
    """The stage maps that the high-resolution tower hands over."""
    return sizes.pyramid * sizes.dtype.itemsize


def reference_peak(sizes: Sizes) -> int:
    """Mining by the original's steps, while they make the values of the pixels of all cells.

    Then the merged map, the same map cut into windows, and its norm are held, with keys and values of every pixel. In
    HD the map reduced for the global view is held too, in float32.
    """
    e, fine, c = sizes.dtype.itemsize, sizes.levels[0][0], sizes.channels
    pixels = sizes.batch * fine**2
    reduced = sizes.batch * (fine // sizes.grid) ** 2 * c * FLOAT32 if sizes.views > sizes.grid**2 else 0
    return pixels * (3 * c + 2 * sizes.dim) * e + reduced


def kernel_peak(sizes: Sizes) -> int:
    """Mining by the kernel: absorbed and pooled queries, and then statistics of the windows or the next step."""
    absorbed = sizes.queries * sizes.channels * sizes.absorbed_itemsize
    pooled = sizes.queries * sizes.channels * sizes.pooled_itemsize
    return absorbed + pooled + max(3 * sizes.queries * sizes.window**2 * FLOAT32, pooled)


def _pixel_bytes(sizes: Sizes) -> int:
    """The pixels for both towers, as the processor makes them and as the towers take them."""
    pixels = sizes.batch * 3 * ((4 * sizes.levels[0][0]) ** 2 + sizes.views * LR**2)
    return pixels * (FLOAT32 + (sizes.dtype.itemsize if sizes.dtype != torch.float32 else 0))


def _finest_bytes(sizes: Sizes) -> int:
    n, c = sizes.levels[0]
    return sizes.batch * n * n * c * sizes.dtype.itemsize


def reference_picture_peak(sizes: Sizes) -> int:
    """From a picture to its image tokens by the original's steps.

    The peak is in the tower as timm runs it, which holds eleven maps of its first stage, or in mining beside the maps.
    """
    return _pixel_bytes(sizes) + max(11 * _finest_bytes(sizes), map_bytes(sizes) + reference_peak(sizes))


def kernel_picture_peak(sizes: Sizes) -> int:
    """From a picture to its image tokens by mg_fast.

    Its tower holds two maps, in float32 also the product that is added to one of them, and an expansion that is as
    large as four maps, in 16 bits with a few more channels, or as a chunk.
    """
    finest = _finest_bytes(sizes)
    maps = 3 if sizes.dtype == torch.float32 else 2
    further = 0 if sizes.dtype == torch.float32 else finest * EXTRA // sizes.levels[0][1]
    tower = maps * finest + min(4 * finest + further, GPU_EXPANSION)
    return _pixel_bytes(sizes) + max(tower, map_bytes(sizes) + kernel_peak(sizes))


def packed_bytes(dtype: torch.dtype) -> int:
    """What the packed towers hold on a GPU beside the model's own weights.

    That is contractions and convolutions of ConvNeXt-L, in 16 bits its expansions, too, with the channels that both
    have more, and the q, k and v of CLIP.
    """
    wide = sum(depth * (4 * c * c + 4 * c + EXTRA * (2 * c + 1)) for c, depth in zip(DIMS, DEPTHS))
    blocks = sum(depth * (4 * c * c + 49 * c) for c, depth in zip(DIMS, DEPTHS))
    between = sum(4 * before * after for before, after in zip(DIMS, DIMS[1:]))
    return (blocks + wide * (dtype.itemsize == 2) + between + (LAYERS - 1) * 3 * WIDTH**2) * dtype.itemsize
