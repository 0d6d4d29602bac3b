"""Tile sizes and warp counts per (kernel, GPU architecture, shape bucket), and the limits of those architectures.

This file holds data only. Launches take their tiles from here, and nothing is tuned at run time.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .compiler import TRITON
from .convolution_configs import DWCONV_NORM as DWCONV_NORM
from .convolution_configs import PIXEL_NORM as PIXEL_NORM
from .convolution_configs import BandsTile as BandsTile
from .convolution_configs import ConvolutionTile as ConvolutionTile
from .convolution_configs import PixelNormTile as PixelNormTile
from .convolution_configs import dwconv_bands_bucket as dwconv_bands_bucket
from .convolution_configs import dwconv_bands_tile as dwconv_bands_tile
from .convolution_configs import dwconv_in_bands as dwconv_in_bands
from .convolution_configs import dwconv_norm_bucket as dwconv_norm_bucket
from .convolution_configs import dwconv_norm_tile as dwconv_norm_tile
from .convolution_configs import pixel_norm_bucket as pixel_norm_bucket
from .convolution_configs import pixel_norm_tile as pixel_norm_tile
from .sampling_configs import DEFORMABLE_ATTENTION as DEFORMABLE_ATTENTION
from .sampling_configs import FEATURE_SYNC as FEATURE_SYNC
from .sampling_configs import SamplingTile as SamplingTile
from .sampling_configs import SyncSlots as SyncSlots
from .sampling_configs import SyncTile as SyncTile
from .sampling_configs import deformable_attention_bucket as deformable_attention_bucket
from .sampling_configs import deformable_attention_tile as deformable_attention_tile
from .sampling_configs import feature_sync_bucket as feature_sync_bucket
from .sampling_configs import feature_sync_tile as feature_sync_tile

# The shared memory in bytes that one block may use, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"). Ahead-of-time compilation fails a configuration that needs more.
SHARED_MEMORY_LIMITS = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


class Tile(NamedTuple):
    """Channels loaded at once, warps of a program, stages of its pipeline, and most registers of a thread (255: any).

    Without a limit the compiler may spill a few registers so that one more program resides on a multiprocessor. With
    one it takes as many registers as it needs, up to the limit.
    """

    channels: int
    warps: int
    stages: int
    registers: int = 255


# Keyed by compute capability, where None holds for every architecture that has no entry of its own. The inner key is
# the bytes of one element of the maps, the pixels of a window rounded up to a power of two, and whether the levels'
# widths allow loads of 16 bytes at once. Where they do not, every element has an address of its own, and larger tiles
# run out of registers. A fourth part, "reduced", marks a global view that needs a tile of its own.
PATCH_MINING = {
    None: {
        (2, 16, True): Tile(64, 2, 2),
        (2, 64, True): Tile(64, 4, 2),
        (2, 128, True): Tile(32, 8, 2),
        (2, 256, True): Tile(32, 8, 2),
        (4, 16, True): Tile(64, 2, 2),
        (4, 64, True): Tile(32, 4, 2),
        (4, 128, True): Tile(32, 8, 2),
        (4, 256, True): Tile(32, 8, 2),
        (2, 16, False): Tile(16, 2, 2),
        (2, 64, False): Tile(16, 4, 2),
        (2, 128, False): Tile(8, 8, 1),
        (2, 256, False): Tile(8, 16, 1),
        (4, 16, False): Tile(16, 2, 2),
        (4, 64, False): Tile(16, 4, 2),
        (4, 128, False): Tile(8, 8, 1),
        (4, 256, False): Tile(8, 16, 1),
    },
    # These entries replace defaults that would spill registers on the architecture.
    80: {
        (2, 64, True): Tile(64, 4, 2, 224),
        (2, 64, True, "reduced"): Tile(64, 8, 2, 224),
        (4, 64, True, "reduced"): Tile(16, 4, 2),
    },
    86: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2, 128)},
    89: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2, 128)},
    100: {(2, 64, True): Tile(64, 4, 2, 168)},
    120: {(2, 64, True): Tile(64, 8, 2), (4, 16, True): Tile(32, 2, 2)},
}
if TRITON >= (3, 8):
    # With the tiles above it would spill 72 bytes of a thread on 8.0, 8 bytes in the backward pass on 9.0, and 64 bytes
    # on 10.0. Without limits nothing spills on 8.0 and 10.0, and more programs reside on a multiprocessor of 8.0.
    PATCH_MINING[80] |= {(2, 64, True): Tile(64, 4, 2), (2, 64, True, "reduced"): Tile(32, 8, 2)}
    del PATCH_MINING[100]
    PATCH_MINING[90] = {(2, 16, False): Tile(8, 2, 2)}
    # On 8.6 and 8.9, float16 maps with float32 queries would spill 16 to 72 bytes without a limit.
    PATCH_MINING[86][2, 64, True] = PATCH_MINING[89][2, 64, True] = Tile(64, 8, 2, 224)


def patch_mining_bucket(element_size: int, side: int, widths: Iterable[int]) -> tuple[int, int, bool]:
    """The bucket of windows of side x side pixels over levels of these widths."""
    # Triton knows only whether a stride is a multiple of 16.
    return (
        element_size,
        next(pixels for pixels in (16, 64, 128, 256) if side * side <= pixels),
        all(width % 16 == 0 for width in widths),
    )


def patch_mining_tile(
    architecture: int | None, element_size: int, side: int, widths: Iterable[int], *, reduced: bool
) -> Tile:
    """The tile for a GPU of this compute capability (90 for 9.0); `reduced` says whether the map is a reduced one."""
    table = PATCH_MINING[None] | PATCH_MINING.get(architecture, {})
    bucket = patch_mining_bucket(element_size, side, widths)
    return reduced and table.get((*bucket, "reduced")) or table[bucket]


class ProductTile(NamedTuple):
    """The tile of one program of a matrix product.

    Attributes:
        rows, columns, depth: sizes of the program's share of the product.
        group: rows of tiles that are taken together.
        warps: warps of the program.
        stages: stages of its software pipeline.
        registers: the most that the compiler may give to a thread.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    registers: int = 255


# Keyed by compute capability (None as above), then by the bytes of one element and by the product's size or layout
# (`pointwise_bucket`). No tile was tuned on a GPU. Those for any architecture are the largest that do not spill. Those
# of 9.0 are the fastest by `python -m bench issue`: with three stages and 128 registers two programs reside on a
# multiprocessor, and one of them multiplies while the other applies its epilogue. A tile of 128 x 256 needs more
# registers. A third part of a key, "gelu", marks a product with GELU that needs a tile of its own.
POINTWISE = {
    None: {
        (2, "few"): ProductTile(64, 64, 64, 8, 4, 4),
        (2, "some"): ProductTile(128, 128, 32, 8, 8, 4),
        (2, "many"): ProductTile(128, 128, 32, 8, 8, 4),
        (2, "narrow"): ProductTile(64, 64, 32, 8, 8, 3),
        (4, "few"): ProductTile(64, 64, 16, 8, 8, 3),
        (4, "some"): ProductTile(128, 64, 16, 8, 8, 3),
        (4, "many"): ProductTile(128, 64, 16, 8, 8, 3),
        (4, "narrow"): ProductTile(64, 64, 16, 8, 8, 3),
    },
    # Without a limit some products would take 170 registers, so that a program would have a multiprocessor alone.
    80: {(2, "many", "gelu"): ProductTile(128, 128, 32, 8, 8, 4, 128)},
    # With the default a product of 192 channels would spill 8 bytes of a thread.
    **dict.fromkeys((86, 89), {(2, "many", "gelu"): ProductTile(128, 128, 32, 8, 8, 3)}),
    120: {(2, "many", "gelu"): ProductTile(128, 64, 32, 8, 4, 4)},
    # These architectures multiply with a whole warp group, and have the shared memory to feed it.
    90: {
        (2, "few"): ProductTile(64, 64, 128, 8, 4, 3),
        (2, "some"): ProductTile(128, 64, 64, 8, 8, 4, 128),
        (2, "many"): ProductTile(128, 128, 64, 8, 8, 3, 128),
    },
    100: {
        (2, "few"): ProductTile(64, 128, 64, 8, 4, 4),
        (2, "some"): ProductTile(128, 128, 64, 8, 8, 4),
        (2, "many"): ProductTile(128, 128, 64, 8, 8, 4),
    },
}
if TRITON >= (3, 8):
    # With the tile above a product of 192 channels in float16 would spill 8 bytes of a thread.
    POINTWISE |= dict.fromkeys((86, 89), {(2, "many", "gelu"): ProductTile(128, 64, 32, 8, 4, 4)})


def pointwise_bucket(element_size: int, m: int, n: int, strides: Iterable[int]) -> tuple[int, str]:
    """The bucket of a product of m rows and n columns; `strides` are the row strides of its matrices, in elements."""
    if any(stride % 16 for stride in strides):
        # Wide loads are impossible, because every element has an address of its own.
        return element_size, "narrow"
    # Up to 64 tiles of 128 x 128 keep at most half of a large GPU busy, and up to 132 are at most one for each
    # multiprocessor of an H200.
    tiles = -(-m // 128) * -(-n // 128)
    return element_size, "few" if tiles <= 64 else "some" if tiles <= 132 else "many"


def pointwise_tile(
    architecture: int | None, element_size: int, m: int, n: int, strides: Iterable[int], *, gelu: bool
) -> ProductTile:
    """The tile for a product of this size on a GPU of this compute capability (90 for 9.0), with GELU or a residual."""
    table = POINTWISE[None] | POINTWISE.get(architecture, {})
    bucket = pointwise_bucket(element_size, m, n, strides)
    return gelu and table.get((*bucket, "gelu")) or table[bucket]


class ResizeTile(NamedTuple):
    """Rows and columns of pixels that a program makes, and its warps."""

    rows: int
    columns: int
    warps: int


# Keyed by compute capability (None holds for every architecture without an entry of its own), then by the pass: first
# over a picture's columns, then over its rows.
DUAL_RESIZE = {None: {"columns": ResizeTile(4, 128, 4), "rows": ResizeTile(4, 128, 4)}}
if TRITON >= (3, 8):
    # With 4 rows and 4 warps it would spill 8 bytes of a thread. This tile has as many pixels for each thread.
    DUAL_RESIZE[80] = {"rows": ResizeTile(8, 128, 8)}


def dual_resize_tile(architecture: int | None, stage: str) -> ResizeTile:
    """The tile of one pass on a GPU of this compute capability (90 for 9.0)."""
    return (DUAL_RESIZE[None] | DUAL_RESIZE.get(architecture, {}))[stage]


@contextlib.contextmanager
def replaced_tile(table: dict, architecture: int | None, key: object, tile: NamedTuple) -> Iterator[None]:
    """Within the block, launches on an architecture (None: interpreted) take this tile for one entry of a table.

    This is for a search for faster tiles, which has to launch a kernel with each of them.
    """
    before = table.get(architecture)
    table[architecture] = {**(before or {}), key: tile}
    try:
        yield
    finally:
        if before is None:
            del table[architecture]
        else:
            table[architecture] = before
