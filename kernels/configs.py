"""Tile sizes and warp counts per (kernel, GPU architecture, shape bucket), and the limits of those architectures.

This file holds data only. Launches take their tiles from here, and nothing is tuned at run time.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .compiler import TRITON
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
    """Channels that are loaded at once, warps of a program, and stages of its software pipeline."""

    channels: int
    warps: int
    stages: int


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
    80: {(2, 64, True, "reduced"): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    86: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    89: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    120: {(2, 64, True): Tile(64, 8, 2), (4, 16, True): Tile(32, 2, 2)},
}
if TRITON >= (3, 8):
    # With the tiles above it would spill 72 bytes of a thread on 8.0, and 8 bytes in the backward pass on 9.0.
    PATCH_MINING[80][2, 64, True, "reduced"] = Tile(32, 8, 2)
    PATCH_MINING[90] = {(2, 16, False): Tile(8, 2, 2)}


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
    # These architectures multiply with a whole warp group, and have the shared memory to feed it.
    90: {
        (2, "few"): ProductTile(64, 64, 128, 8, 4, 3),
        (2, "some"): ProductTile(128, 64, 64, 8, 8, 4, 128),
        (2, "many"): ProductTile(128, 128, 64, 8, 8, 3, 128),
        # The tile above spilled with an earlier form of this epilogue, and has not been recorded with today's.
        (2, "many", "gelu"): ProductTile(64, 256, 64, 8, 8, 2, 128),
    },
    100: {
        (2, "few"): ProductTile(64, 128, 64, 8, 4, 4),
        (2, "some"): ProductTile(128, 128, 64, 8, 8, 4),
        (2, "many"): ProductTile(128, 128, 64, 8, 8, 4),
    },
}


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


class ConvolutionTile(NamedTuple):
    """Rows and columns of pixels that a program computes, channels that are convolved at once, and warps."""

    rows: int
    columns: int
    channels: int
    warps: int


class BandsTile(NamedTuple):
    """The tile of a depthwise convolution on tensor cores: 16 strips of 2 columns, in one or more layers.

    Attributes:
        rows: of a strip, an even number.
        columns: of all strips side by side: 8, 16 or 32.
        channels: that one load takes, and one warp convolves.
        warps: of a program.
    """

    rows: int
    columns: int
    channels: int
    warps: int


# Keyed by compute capability as above, then by the largest number of channels and by whether a load takes several
# channels of a pixel at once. Only float32 maps take wide ones here, as tensor cores convolve those of 16 bits. A
# thread holds its rows for 4 channels (for 2 where loads are narrow and each has an address of its own) of up to three
# chunks, because the width of every published ConvNeXt is 2^k or 3 * 2^k. The tiles were not tuned on a GPU. 6 rows
# divide the maps of 768 pixels; 8 rows would take fewer instructions, but would leave too few programs of one picture
# for an H100, and would spill. The tiles of "bands" are the fastest for an H200 by `python -m bench issue`. A map of
# many channels has few pixels, and needs more programs.
DWCONV_NORM = {
    None: {
        (192, True): ConvolutionTile(6, 8, 64, 4),
        (384, True): ConvolutionTile(6, 4, 128, 4),
        (768, True): ConvolutionTile(6, 2, 256, 4),
        (1536, True): ConvolutionTile(6, 1, 512, 4),
        (3072, True): ConvolutionTile(6, 1, 1024, 8),
        # No published model has widths or strides that are not multiples of 16.
        (192, False): ConvolutionTile(2, 4, 64, 4),
        (3072, False): ConvolutionTile(2, 1, 1024, 16),
        (768, "bands"): BandsTile(12, 16, 4, 4),
        (3072, "bands"): BandsTile(8, 16, 4, 4),
    },
}
if TRITON >= (3, 8):
    # With 6 rows they would spill up to 24 bytes of a thread.
    DWCONV_NORM |= dict.fromkeys(
        (86, 89, 90),
        {
            (768, True): ConvolutionTile(4, 2, 256, 4),
            (1536, True): ConvolutionTile(4, 1, 512, 4),
            (3072, True): ConvolutionTile(4, 1, 1024, 8),
        },
    )


def dwconv_norm_bucket(channels: int, strides: Iterable[int]) -> tuple[int, bool]:
    """The bucket of a map: its channels, and its strides between pictures, rows and columns, in elements."""
    # Triton knows only whether a stride is a multiple of 16.
    wide = all(number % 16 == 0 for number in (channels, *strides))
    return next(most for most in ((192, 384, 768, 1536, 3072) if wide else (192, 3072)) if channels <= most), wide


def dwconv_norm_tile(architecture: int | None, channels: int, strides: Iterable[int]) -> ConvolutionTile:
    """The tile for this map on a GPU of this compute capability."""
    table = DWCONV_NORM[None] | DWCONV_NORM.get(architecture, {})
    return table[dwconv_norm_bucket(channels, strides)]


def dwconv_bands_bucket(channels: int) -> tuple[int, str]:
    """The bucket of a map that is convolved on tensor cores."""
    return 768 if channels <= 768 else 3072, "bands"


def dwconv_bands_tile(architecture: int | None, channels: int) -> BandsTile:
    """The tile for a map of so many channels on a GPU of this compute capability."""
    return (DWCONV_NORM[None] | DWCONV_NORM.get(architecture, {}))[dwconv_bands_bucket(channels)]


def dwconv_in_bands(element_size: int, channels: int, strides: Iterable[int]) -> bool:
    """Whether a map is convolved on tensor cores: where its numbers have 16 bits, and all its strides allow wide loads.

    Args:
        element_size: bytes of one element.
        strides: between pictures, rows and columns, in elements.
    """
    return element_size == 2 and dwconv_norm_bucket(channels, strides)[1]


class PixelNormTile(NamedTuple):
    """Pixels of a program, channels that are loaded at once, and warps."""

    pixels: int
    channels: int
    warps: int


# Keyed by compute capability as above, then by the largest number of channels and the kernel. A thread holds 8 channels
# of a pixel in each of up to three chunks.
PIXEL_NORM = {
    None: {
        (192, "norm"): PixelNormTile(16, 64, 4),
        (384, "norm"): PixelNormTile(8, 128, 4),
        (768, "norm"): PixelNormTile(4, 256, 4),
        (1536, "norm"): PixelNormTile(2, 512, 4),
        (3072, "norm"): PixelNormTile(1, 1024, 4),
    }
}


def pixel_norm_bucket(channels: int) -> tuple[int, str]:
    """The bucket of pixels of so many channels."""
    return next(most for most in (192, 384, 768, 1536, 3072) if channels <= most), "norm"


def pixel_norm_tile(architecture: int | None, channels: int) -> PixelNormTile:
    """The tile for pixels of so many channels on a GPU of this compute capability."""
    return (PIXEL_NORM[None] | PIXEL_NORM.get(architecture, {}))[pixel_norm_bucket(channels)]


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
