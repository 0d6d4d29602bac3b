"""Bilinear resizing as tables: the coarse pixels that make up a window of a resized map, and their weights.

A map of `size` x `size` pixels is upsampled to `fine` and then, for a global view, reduced by `reduction`, both as
F.interpolate does it (bilinear, align_corners=False).
"""

import functools

import torch

from ...runtime.device_tables import cached_on_device


@cached_on_device()
def resize_matrix(fine: int, size: int, reduction: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [fine / reduction, size] that upsamples `size` pixels to `fine` and then reduces them."""
    pixels, taps = torch.arange(fine // reduction, device=device), torch.arange(size, device=device)
    return _weights(pixels[:, None], taps, fine, size, reduction, dtype)


@cached_on_device()
def window_tables(fine: int, size: int, reduction: int, regions: int, device: torch.device, dtype: torch.dtype):
    """Which of the size x size coarse pixels the windows need, and with which weights.

    Returns:
        index [G, G * K * K] of the pixels of each row of windows, window by window and column by column; weights
        [G, M, K] that make the M pixel rows of a window from K rows of coarse pixels. The columns have the same
        weights.
    """
    k = reach(fine, size, reduction, regions)
    # The units are those of the weights. Windows at the end are moved inwards, so that all windows are equally wide.
    first = torch.arange(regions, device=device) * (fine // regions) + (reduction - 1) // 2
    first = ((2 * first + 1) * size - fine).clamp(min=0) // (2 * fine)
    taps = first.clamp(max=size - k)[:, None] + torch.arange(k, device=device)
    index = taps[:, None, None, :] * size + taps[None, :, :, None]
    pixels = torch.arange(fine // reduction, device=device).reshape(regions, -1, 1)
    return index.flatten(1), _weights(pixels, taps[:, None], fine, size, reduction, dtype)


def _weights(
    pixels: torch.Tensor, taps: torch.Tensor, fine: int, size: int, reduction: int, dtype: torch.dtype
) -> torch.Tensor:
    """The share of each coarse pixel in each pixel of the map that is upsampled and then reduced.

    Both steps are F.interpolate's bilinear ones (align_corners=False).
    """
    weights = 0
    # The middle of a block of fine pixels that are reduced to one: one of them, or between two.
    for middle in ((reduction - 1) // 2, reduction // 2):
        pixel = pixels * reduction + middle
        # Positions are whole numbers, in units of 1 / (2 * fine) coarse pixels.
        position = ((2 * pixel + 1) * size - fine).clamp(0, 2 * fine * (size - 1))
        weights = weights + (1 - (position - 2 * fine * taps).abs().to(dtype) / (2 * fine)).clamp(min=0) / 2
    return weights


@cached_on_device()
def strip_tables(fine: int, size: int, reduction: int, regions: int, device: torch.device, dtype: torch.dtype):
    """As `window_tables`, for windows that are equally far apart and may begin before the map and end after it.

    Returns:
        The first coarse pixel of the first window; the number of coarse pixels from one window to the next, which is
        whole; weights [G, M, K].
    """
    side = fine // regions
    begin, end = (reduction - 1) // 2, side - reduction + reduction // 2
    first, last = ((2 * begin + 1) * size - fine) // (2 * fine), -((fine - (2 * end + 1) * size) // (2 * fine))
    step = side * size // fine
    taps = first + torch.arange(regions, device=device)[:, None] * step + torch.arange(last - first + 1, device=device)
    pixels = torch.arange(fine // reduction, device=device).reshape(regions, -1, 1)
    return first, step, _weights(pixels, taps[:, None], fine, size, reduction, dtype)


@torch.compiler.assume_constant_result
def reach(fine: int, size: int, reduction: int, regions: int) -> int:
    """The most coarse pixels along one axis that make up one of `regions` equal parts of the resized map."""
    return _cached_reach(fine, size, reduction, regions)


@functools.lru_cache(maxsize=256)
def _cached_reach(fine: int, size: int, reduction: int, regions: int) -> int:
    side, reach = fine // regions, 0
    for region in range(regions):
        first, last = region * side + (reduction - 1) // 2, (region + 1) * side - reduction + reduction // 2
        start = max((2 * first + 1) * size - fine, 0) // (2 * fine)
        end = min(-(-max((2 * last + 1) * size - fine, 0) // (2 * fine)), size - 1)
        reach = max(reach, end - start + 1)
    return reach


def neighbours(fine: int, size: int, reduction: int) -> int:
    """The most neighbouring coarse pixels along one axis that make up one pixel."""
    return reach(fine, size, reduction, fine // reduction)
