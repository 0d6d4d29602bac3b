"""Bilinear resizing window by window: the coarse pixels that make up a window's pixels, and their weights.

A window is M x M pixels of the map that the level is upsampled to (F.interpolate, bilinear, align_corners=False) and
that may then be reduced. Positions are whole numbers in units of 1 / (2 * den) coarse pixels, so weights are exact
where den is a power of two. There are no tables: weights are computed from sizes, where they are used.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Level(NamedTuple):
    """One level of the pyramid: its pixels, their strides in elements, and its side in pixels."""

    pixels: torch.Tensor
    stride_b: int
    stride_y: int
    stride_x: int
    size: int


# This is not a NamedTuple, because Triton drops the field names of constants.
@dataclass(frozen=True)
class Geometry:
    """What is constant about one level in one launch.

    Attributes:
        channels: channels of the level.
        offset: position of its first channel among the channels of all levels.
        num, den: the ratio of its side to the finest level's side, in lowest terms.
        taps: side, in coarse pixels, of the level's part of a window; 0 where window pixels are made tap by tap.
        block_taps: taps * taps, rounded up to a power of two, at least 16.
        span: side, in coarse pixels, of the square that makes up one window pixel.
        side: side M of the window in pixels.
        reduction: factor by which the finest map is reduced.
        block_pixels: M * M, rounded up to a power of two, at least 16.
        block_channels: channels that are loaded at once.
    """

    channels: int
    offset: int
    num: int
    den: int
    taps: int
    block_taps: int
    span: int
    side: int
    reduction: int
    block_pixels: int
    block_channels: int


@triton.jit
def resize_weight(o_pixel, o_tap, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """Weight of coarse pixel `o_tap` (of n) in pixel `o_pixel` of the map upsampled by DEN / NUM and reduced.

    The weight is exact where DEN is a power of two.
    """
    NUM: tl.constexpr = GEOMETRIES[S].num
    DEN: tl.constexpr = GEOMETRIES[S].den
    REDUCTION: tl.constexpr = GEOMETRIES[S].reduction
    # Positions are whole numbers in units of 1 / unit coarse pixels.
    unit: tl.constexpr = 2 * DEN
    o_fine = o_pixel * REDUCTION + (REDUCTION - 1) // 2
    o_at = tl.minimum(tl.maximum((2 * o_fine + 1) * NUM - DEN, 0), unit * (n - 1))
    b_w = tl.maximum(unit - tl.abs(o_at - unit * o_tap), 0)
    if REDUCTION % 2 == 0:
        # The middle of an even number of fine pixels lies between two of them.
        o_at = tl.minimum(tl.maximum((2 * o_fine + 3) * NUM - DEN, 0), unit * (n - 1))
        b_w += tl.maximum(unit - tl.abs(o_at - unit * o_tap), 0)
        scale: tl.constexpr = 0.5 / unit
    else:
        scale: tl.constexpr = 1.0 / unit
    return b_w.to(tl.float32) * scale


@triton.jit
def first_tap(o_pixel, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """The first coarse pixel that has a weight in pixel `o_pixel`."""
    NUM: tl.constexpr = GEOMETRIES[S].num
    DEN: tl.constexpr = GEOMETRIES[S].den
    REDUCTION: tl.constexpr = GEOMETRIES[S].reduction
    o_fine = o_pixel * REDUCTION + (REDUCTION - 1) // 2
    return tl.minimum(tl.maximum((2 * o_fine + 1) * NUM - DEN, 0) // (2 * DEN), n - 1)


@triton.jit
def window_taps(row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """The coarse pixels of a window (rows, columns and mask [BK]), and their weights in its pixels [BJ, BK]."""
    K: tl.constexpr = GEOMETRIES[S].taps
    BK: tl.constexpr = GEOMETRIES[S].block_taps
    SIDE: tl.constexpr = GEOMETRIES[S].side
    BJ: tl.constexpr = GEOMETRIES[S].block_pixels
    o_k = tl.arange(0, BK)
    o_j = tl.arange(0, BJ)
    o_y = first_tap(row * SIDE, n, GEOMETRIES, S) + o_k // K
    o_x = first_tap(column * SIDE, n, GEOMETRIES, S) + o_k % K
    b_y = resize_weight((row * SIDE + o_j // SIDE)[:, None], o_y[None, :], n, GEOMETRIES, S)
    b_x = resize_weight((column * SIDE + o_j % SIDE)[:, None], o_x[None, :], n, GEOMETRIES, S)
    b_r = tl.where((o_j < SIDE * SIDE)[:, None] & (o_k < K * K)[None, :], b_y * b_x, 0.0)
    # A coarse pixel without a weight is not loaded, since it may lie outside the map or not be finite.
    return o_y, o_x, tl.max(b_r, axis=0) > 0.0, b_r


@triton.jit
def pixel_tap(i_tap, row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """One coarse pixel for each window pixel: rows, columns and weights [BJ]."""
    SPAN: tl.constexpr = GEOMETRIES[S].span
    SIDE: tl.constexpr = GEOMETRIES[S].side
    BJ: tl.constexpr = GEOMETRIES[S].block_pixels
    o_j = tl.arange(0, BJ)
    o_row = row * SIDE + o_j // SIDE
    o_column = column * SIDE + o_j % SIDE
    o_y = first_tap(o_row, n, GEOMETRIES, S) + i_tap // SPAN
    o_x = first_tap(o_column, n, GEOMETRIES, S) + i_tap % SPAN
    b_w = resize_weight(o_row, o_y, n, GEOMETRIES, S) * resize_weight(o_column, o_x, n, GEOMETRIES, S)
    return o_y, o_x, tl.where(o_j < SIDE * SIDE, b_w, 0.0)


@triton.jit
def load_pixels(level, i_b, o_y, o_x, m_p, o_c, m_c):
    """Loads pixels of one picture's level as float32 [pixels, BC]."""
    o_p = i_b * level.stride_b + o_y.to(tl.int64) * level.stride_y + o_x.to(tl.int64) * level.stride_x
    return tl.load(level.pixels + o_p[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(
        tl.float32
    )


def _taps(pixel: int, n: int, ratio: tuple[int, int], reduction: int) -> tuple[int, int]:
    """First and last coarse pixel that have a weight in a pixel: `first_tap` and `resize_weight` on the host."""
    fine, (num, den) = pixel * reduction + (reduction - 1) // 2, ratio
    first = max((2 * fine + 1) * num - den, 0) // (2 * den)
    fine += reduction % 2 == 0
    last = -(-max((2 * fine + 1) * num - den, 0) // (2 * den))
    return min(first, n - 1), min(last, n - 1)


@functools.lru_cache(maxsize=256)
def reach(fine: int, n: int, reduction: int, side: int) -> tuple[tuple[int, int], int, int]:
    """A level's ratio to the finest level, and the most coarse pixels along a window's and along a pixel's side."""
    ratio = (n // math.gcd(fine, n), fine // math.gcd(fine, n))
    taps = [_taps(pixel, n, ratio, reduction) for pixel in range(fine // reduction)]
    window = max(taps[i + side - 1][1] - taps[i][0] + 1 for i in range(0, len(taps), side))
    return ratio, window, max(last - first + 1 for first, last in taps)


def geometry(level: torch.Tensor, offset: int, fine: int, reduction: int, side: int, block_channels: int) -> Geometry:
    ratio, window, span = reach(fine, level.shape[1], reduction, side)
    # Weights are multiples of 1 / (2 * den), or of half of that for an even reduction. The condition keeps their
    # products within 11 bits, as many as TF32 has.
    dyadic = ratio[0] == 1 and ratio[1].bit_count() == 1 and ratio[1] * (2 - reduction % 2) <= 16
    product = level.element_size() == 2 and dyadic and span > 1 and window <= 8 and side <= 8
    taps = window if product else 0
    block_taps, block_pixels = (max(16, triton.next_power_of_2(count)) for count in (taps * taps, side * side))
    return Geometry(
        level.shape[-1], offset, *ratio, taps, block_taps, span, side, reduction, block_pixels, block_channels
    )
