"""Windows of coarse pixels: which ones a window takes, as a list, and their weights in the window's pixels.

This is what `windows` is for kernels that never make a window's pixels. Both sides of a window are padded to powers of
two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .windows import first_tap, reach, resize_weight

# The most channels of a pooled window that are made at once, which keeps its sums and their addresses in registers.
POOLED = 64


# This is not a NamedTuple, because Triton drops the field names of constants.
@dataclass(frozen=True)
class CoarseGeometry:
    """What is constant about one level in one launch that works on coarse pixels only.

    Fields that `windows.Geometry` has, too, mean the same; both serve `resize_weight` and `first_tap`.

    Attributes:
        taps: side, in coarse pixels, of the level's part of a window.
        padded_taps: the same, rounded up to a power of two, at least 4.
        block_taps: taps * taps, rounded up to a power of two, at least 16: the coarse pixels that are loaded at once.
        stride: how many of these make up a row: padded_taps where all padded rows fit, otherwise taps.
        padded_side: `side` rounded up to a power of two, at least 4.
        gram: the largest span of any launch that reads the level's planes.
        pooled_channels: channels of the pooled window that are made at once.
        tile_channels: channels that a program loads at once of the 64 pixels of a tile.
    """

    channels: int
    offset: int
    num: int
    den: int
    taps: int
    padded_taps: int
    block_taps: int
    stride: int
    span: int
    gram: int
    side: int
    padded_side: int
    reduction: int
    block_channels: int
    pooled_channels: int
    tile_channels: int


@triton.jit
def _axis_weights(start, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """The first coarse pixel along one axis of a window, and the weights [side, taps] of coarse pixels in its pixels.

    Both sides are padded to powers of two.
    """
    SIDE: tl.constexpr = GEOMETRIES[S].side
    K: tl.constexpr = GEOMETRIES[S].taps
    o_p = tl.arange(0, GEOMETRIES[S].padded_side)
    o_k = tl.arange(0, GEOMETRIES[S].padded_taps)
    first = first_tap(start, n, GEOMETRIES, S)
    b_w = resize_weight((start + o_p)[:, None], (first + o_k)[None, :], n, GEOMETRIES, S)
    return first, tl.where((o_p < SIDE)[:, None] & (o_k < K)[None, :], b_w, 0.0)


@triton.jit
def listed(b_grid, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """Numbers of a window's coarse pixels [padded taps, padded taps] as the list [BK] in which pixels are loaded."""
    PADDED: tl.constexpr = GEOMETRIES[S].padded_taps
    STRIDE: tl.constexpr = GEOMETRIES[S].stride
    BK: tl.constexpr = GEOMETRIES[S].block_taps
    b_flat = tl.reshape(b_grid, [PADDED * PADDED])
    if STRIDE != PADDED:
        o_k = tl.minimum(tl.arange(0, BK), STRIDE * STRIDE - 1)
        b_flat = tl.gather(b_flat, o_k // STRIDE * PADDED + o_k % STRIDE, axis=0)
        b_flat = tl.where(tl.arange(0, BK) < STRIDE * STRIDE, b_flat, 0)
    return b_flat


@triton.jit
def coarse_pixels(row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """A window's coarse pixels and their weights.

    Returns rows, columns and mask of the listed pixels, each [BK], and the weights [side, taps] of coarse rows in the
    window's rows, and of columns in columns. A pixel without a weight is masked, because it may lie outside the map or
    not be finite.
    """
    SIDE: tl.constexpr = GEOMETRIES[S].side
    STRIDE: tl.constexpr = GEOMETRIES[S].stride
    first_y, b_y = _axis_weights(row * SIDE, n, GEOMETRIES, S)
    first_x, b_x = _axis_weights(column * SIDE, n, GEOMETRIES, S)
    o_k = tl.arange(0, GEOMETRIES[S].block_taps)
    b_some = tl.max(b_y, axis=0)[:, None] * tl.max(b_x, axis=0)[None, :]
    m_k = listed(b_some, GEOMETRIES, S) > 0.0
    return first_y + o_k // STRIDE, first_x + o_k % STRIDE, m_k, b_y, b_x


@triton.jit
def pixel_weights(row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """Row and column of the first coarse pixel of every pixel of a window [BJ], and a tuple of weights [BJ].

    The weights are those of the span x span coarse pixels from the first one on, row by row.
    """
    SPAN: tl.constexpr = GEOMETRIES[S].span
    SIDE: tl.constexpr = GEOMETRIES[S].side
    PADDED: tl.constexpr = GEOMETRIES[S].padded_side
    o_j = tl.arange(0, PADDED * PADDED)
    m_j = (o_j // PADDED < SIDE) & (o_j % PADDED < SIDE)
    j_y, j_x = row * SIDE + o_j // PADDED, column * SIDE + o_j % PADDED
    t_y, t_x = first_tap(j_y, n, GEOMETRIES, S), first_tap(j_x, n, GEOMETRIES, S)
    rows = ()
    columns = ()
    for i in tl.static_range(SPAN):
        rows = rows + (tl.where(m_j, resize_weight(j_y, t_y + i, n, GEOMETRIES, S), 0.0),)
        columns = columns + (resize_weight(j_x, t_x + i, n, GEOMETRIES, S),)
    weights = ()
    for i in tl.static_range(SPAN * SPAN):
        weights = weights + (rows[i // SPAN] * columns[i % SPAN],)
    return t_y, t_x, weights


@triton.jit
def load_coarse(level, i_b, o_y, o_x, m_k, o_c, m_c):
    """Loads listed pixels of one picture's level, [BK, BC]."""
    o_p = i_b * level.stride_b + o_y.to(tl.int64) * level.stride_y + o_x.to(tl.int64) * level.stride_x
    return tl.load(level.pixels + o_p[:, None] + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)


def coarse_geometries(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, elements: Sequence[int]
) -> list[tuple[CoarseGeometry, ...]]:
    """The levels' geometries for the launch over the cells' windows, and for the global view's if there is one.

    Args:
        queries, pyramid, grid: those of the operation.
        elements: numbers of a level that a program loads at once: first one on a tile, then one of each launch.
    """
    fine, widths = pyramid[0].shape[1], [level.shape[-1] for level in pyramid]
    side = fine // (grid * math.isqrt(queries.shape[2]))
    reductions = (1, grid) if queries.shape[1] > grid * grid else (1,)
    # The planes serve all launches.
    grams = [max(reach(fine, level.shape[1], reduction, side)[2] for reduction in reductions) for level in pyramid]

    def geometry(s: int, level: torch.Tensor, reduction: int, at_once: int) -> CoarseGeometry:
        ratio, taps, span = reach(fine, level.shape[1], reduction, side)
        padded_taps, padded_side = (max(4, triton.next_power_of_2(count)) for count in (taps, side))
        block_taps, most = max(16, triton.next_power_of_2(taps * taps)), max(16, triton.next_power_of_2(widths[s]))
        block_channels = max(16, min(most, at_once // block_taps))
        return CoarseGeometry(
            channels=widths[s],
            offset=sum(widths[:s]),
            num=ratio[0],
            den=ratio[1],
            taps=taps,
            padded_taps=padded_taps,
            block_taps=block_taps,
            stride=padded_taps if padded_taps**2 == block_taps else taps,
            span=span,
            gram=grams[s],
            side=side,
            padded_side=padded_side,
            reduction=reduction,
            block_channels=block_channels,
            pooled_channels=min(block_channels, POOLED),
            tile_channels=min(most, elements[0] // 64),
        )

    return [
        tuple(geometry(s, level, reduction, at_once) for s, level in enumerate(pyramid))
        for reduction, at_once in zip(reductions, elements[1:])
    ]
