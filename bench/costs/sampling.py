"""The cost of deformable attention and of the feature synchronizer, and the sizes in which models call them.

A sample counts as four multiplications and additions for each channel, as the records of the operations declare. torch
itself counts none for the samples of its own operators.
"""

import math
from dataclasses import dataclass

import torch

from mg_fast.ops.operation import product_flop

from ..registry import Cost
from .operators import FLOAT32


@dataclass(frozen=True)
class SamplingSizes:
    """The sizes of one call of deformable_attention.

    Args:
        levels: height and width of every map.
        channels: of one head.
        points: of each level.
        grid: whether there is a query for every pixel of every level, as in an encoder; `queries` is then their sum.
    """

    dtype: torch.dtype
    levels: tuple[tuple[int, int], ...]
    queries: int
    batch: int = 1
    heads: int = 8
    channels: int = 32
    points: int = 4
    grid: bool = False

    @property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def samples(self) -> int:
        """Samples of all queries and heads."""
        return self.batch * self.queries * self.heads * len(self.levels) * self.points

    @property
    def value(self) -> int:
        """Elements of the maps."""
        return self.batch * self.pixels * self.heads * self.channels

    @property
    def output(self) -> int:
        """Elements of the result."""
        return self.batch * self.queries * self.heads * self.channels


# The maps of Deformable DETR at strides of 8 to 64, for a picture of 672 x 896 pixels: 12,502 pixels in all.
DETR = ((84, 112), (42, 56), (21, 28), (11, 14))
# The maps of RT-DETR for a picture of 640 x 640 pixels.
RT_DETR = ((80, 80), (40, 40), (20, 20))
# MM-Interleaved's adapter: patches read the maps of its convolutions, and these read the patches.
MAPS, PATCHES = ((32, 32), (16, 16), (8, 8)), ((16, 16),)
# The encoder has a query for every pixel.
ENCODER = SamplingSizes(torch.float32, DETR, sum(h * w for h, w in DETR), grid=True)
SAMPLERS = {
    "detr-encoder": ENCODER,
    "detr-decoder": SamplingSizes(torch.float32, DETR, 300),
    "rt-detr": SamplingSizes(torch.float32, RT_DETR, 300),
    "adapter-injector": SamplingSizes(torch.float32, MAPS, 256, heads=16),
    "adapter-extractor": SamplingSizes(torch.float32, PATCHES, 1344, heads=16),
}


def sampling_flop(samples: int, channels: int) -> int:
    """FLOP of samples of four pixels each."""
    return product_flop(4 * samples, channels, 1)


def pixels_read(levels: tuple[tuple[int, int], ...], samples: int) -> int:
    """The most pixels that so many samples of each level can need: four for a sample, and none twice."""
    return sum(min(h * w, 4 * samples) for h, w in levels)


def deformable_floor(sizes: SamplingSizes) -> Cost:
    """The floor of one call: the pixels that are sampled once, locations in float32, weights, and the result."""
    e = sizes.dtype.itemsize
    read = sizes.batch * pixels_read(sizes.levels, sizes.queries * sizes.points) * sizes.heads * sizes.channels * e
    flop = sampling_flop(sizes.samples, sizes.channels)
    return Cost(flop, read + sizes.samples * (2 * FLOAT32 + e), sizes.output * e)


def deformable_training_floor(sizes: SamplingSizes) -> Cost:
    """The floor of a call and its backward pass.

    The backward pass reads what the call read and the gradient of the result, and writes a gradient for every element
    of the maps, locations and weights. For every sample and pixel it adds to the pixel's gradient, and multiplies the
    pixel with the gradient of the result, from which the other two gradients follow.
    """
    e = sizes.dtype.itemsize
    forward = deformable_floor(sizes)
    gradients = sizes.value * e + sizes.samples * (2 * FLOAT32 + e)
    return forward + Cost(2 * forward.flop, forward.bytes_read + sizes.output * e, gradients)


@dataclass(frozen=True)
class SyncSizes:
    """The sizes of one call of the feature synchronizer.

    Args:
        width: channels of a query, and of the result.
        pictures: for each row of the batch.
        levels: side of every map.
        base: the number of offset units along the side of a map.
        relations: rows of the table of relative indices.
        inner: channels of all heads together.
        features: channels of a picture's features.
        block: whether it is a block of the diffusion decoder, with norms, positions, a last product and a residual
            around the synchronizer; `queries` is then a square.
    """

    dtype: torch.dtype
    queries: int
    pictures: int
    width: int
    levels: tuple[int, ...]
    base: int
    relations: int
    batch: int = 1
    inner: int = 1024
    features: int = 1024
    heads: int = 16
    points: int = 8
    block: bool = False

    @property
    def side(self) -> int:
        """Queries along a side of a block."""
        return math.isqrt(self.queries)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(side, side) for side in self.levels]

    @property
    def pixels(self) -> int:
        """Pixels of a picture's maps."""
        return sum(side**2 for side in self.levels)

    @property
    def samples(self) -> int:
        """Samples of all queries and heads, where every query sees every picture."""
        return self.batch * self.queries * self.pictures * self.logits

    @property
    def logits(self) -> int:
        """Logits of a query and a picture, without those of the ignored slots."""
        return self.heads * len(self.levels) * self.points

    @property
    def offsets(self) -> int:
        return self.heads * self.points * 2


# One of the language model's synchronizers: tokens of 5120 channels, a table of 50 positions.
LANGUAGE = SyncSizes(torch.float32, 1, 1, width=5120, levels=(32, 16, 8), base=16, relations=50)
# The diffusion decoder's blocks: side and channels of a map, and how many blocks have them.
BLOCKS = {
    "unet-64": (64, 320, 3),
    "unet-32-narrow": (32, 320, 1),
    "unet-32": (32, 640, 2),
    "unet-16-narrow": (16, 640, 1),
    "unet-16": (16, 1280, 2),
    "unet-8": (8, 1280, 4),
}


def block_sizes(side: int, width: int, dtype: torch.dtype) -> SyncSizes:
    """One of the decoder's blocks, which reads the picture before."""
    return SyncSizes(dtype, side**2, 1, width, (64, 32, 16, 8), base=side, relations=10, block=True)


def reference_sync_flop(sizes: SyncSizes) -> int:
    """FLOP of the original's steps, which project a copy of the query for every picture, and the features each time."""
    copies, width = sizes.batch * sizes.pictures * sizes.queries, sizes.width
    ignored = sizes.heads * len(sizes.levels)
    flop = product_flop(copies, width, width)
    flop += product_flop(copies, width, sizes.offsets + sizes.logits + ignored)
    return flop + values_flop(sizes) + _output_flop(sizes, sizes.block)


def values_flop(sizes: SyncSizes) -> int:
    """FLOP of the values of all pictures, which can be kept."""
    return product_flop(sizes.batch * sizes.pictures * sizes.pixels, sizes.features, sizes.inner)


def packed_sync_flop(sizes: SyncSizes) -> int:
    """FLOP of the packed form with values that were kept: one product for the queries, and one for the result."""
    rows = sizes.batch * sizes.queries
    return product_flop(rows, sizes.width, sizes.offsets + sizes.logits) + _output_flop(sizes, False)


def _output_flop(sizes: SyncSizes, convolution: bool) -> int:
    rows, width = sizes.batch * sizes.queries, sizes.width
    return product_flop(rows, sizes.inner, width) + convolution * product_flop(rows, width, width)


def sync_floor(sizes: SyncSizes) -> Cost:
    """The floor with values that were kept: the packed form's products, the samples, and all that it needs once.

    That is weights, queries, the result and the sampled pixels; the indices of the pictures and the rows of the table
    are left out.
    """
    projected, width = sizes.offsets + sizes.logits, sizes.width
    weights = projected * width + sizes.inner * width
    pixels = pixels_read(tuple(sizes.shapes), sizes.queries * sizes.points)
    values = sizes.batch * sizes.pictures * pixels * sizes.inner
    rows = sizes.batch * sizes.queries * width
    e = sizes.dtype.itemsize
    # A block adds a table of projected positions.
    positions = sizes.queries * projected if sizes.block else 0
    flop = packed_sync_flop(sizes) + sampling_flop(sizes.samples, sizes.inner // sizes.heads)
    return Cost(flop, e * (weights + values + rows + positions), e * rows)
