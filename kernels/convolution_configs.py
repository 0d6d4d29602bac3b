"""Tile sizes of the kernels of depthwise convolution and of the norm after it.

This file belongs to configs.py, which imports all of its names and through which kernels take their tiles.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .compiler import TRITON


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


# Keyed by compute capability, where None holds for every architecture that has no entry of its own, then by the largest
# number of channels and by whether a load takes several channels of a pixel at once. Only float32 maps take wide ones
# here, as tensor cores convolve those of 16 bits. A thread holds its rows for 4 channels (for 2 where loads are narrow
# and each has an address of its own) of up to three chunks, because the width of every published ConvNeXt is 2^k or 3 *
# 2^k. The tiles were not tuned on a GPU. 6 rows divide the maps of 768 pixels; 8 rows would take fewer instructions,
# but would leave too few programs of one picture for an H100, and would spill. The tiles of "bands" are the fastest for
# an H200 by `python -m bench issue`. A map of many channels has few pixels, and needs more programs.
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
