"""Pools the pixels of each query's window of the pyramid: p = sum_j softmax_j(u . x_j) x_j.

x_j are the M x M pixels of the window: the levels upsampled to the finest one, concatenated, and LayerNorm'ed over all
channels. Levels [B, n_s, n_s, C_s] are read at their own resolution, with unit channel stride, and the halo of the
bilinear resizing is clamped at the border. The upsampled map, its windows, keys and values never exist. One program per
window reads its pixels twice: once for scores and statistics, then, from the cache, for the weighted sum. The backward
pass to the queries does the same. All arithmetic is float32 from the load on.

Coarse pixels become window pixels by a matrix product where that is exact in TF32 (16-bit maps, dyadic weights), and
tap by tap elsewhere. A picture of few queries leaves most of a GPU idle, with less than one program per multiprocessor;
the PyTorch form may be faster there.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .configs import patch_mining_tile
from .window_programs import (
    LAYER_NORM_EPS,
    architecture_of,
    channels_last,
    empty_results,
    inverse_deviation,
    keep_statistics,
    place,
    softmax_of_window,
    weights_of_gradient,
    window_launches,
    window_side,
)
from .windows import geometry, load_pixels, pixel_tap, window_taps


@triton.jit
def _shifts(level, i_b, row, column, GEOMETRIES: tl.constexpr):
    """The mean of some channels of the first level at every pixel of the window [BJ].

    Subtracting it from all channels of the pixel keeps an offset that is much larger than their spread from drowning
    the spread.
    """
    C: tl.constexpr = GEOMETRIES[0].channels
    SPAN: tl.constexpr = GEOMETRIES[0].span
    BJ: tl.constexpr = GEOMETRIES[0].block_pixels
    BC: tl.constexpr = GEOMETRIES[0].block_channels
    COUNT: tl.constexpr = min(BC, C)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_shift = tl.zeros([BJ], tl.float32)
    for i_tap in range(SPAN * SPAN):
        t_y, t_x, b_w = pixel_tap(i_tap, row, column, level.size, GEOMETRIES, 0)
        b_shift += b_w * tl.sum(load_pixels(level, i_b, t_y, t_x, b_w > 0.0, o_c, m_c), axis=1)
    return b_shift / COUNT


@triton.jit
def _scan(level, vector_ptr, i_b, row, column, b_shift, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """One level's share of the sums over channels that scores and LayerNorm need.

    Returns three sums for every window pixel less `b_shift`, each [BJ]: its dot product with the vector, the sum and
    the sum of squares of its channels; and the sum of the vector's elements.
    """
    C: tl.constexpr = GEOMETRIES[S].channels
    OFFSET: tl.constexpr = GEOMETRIES[S].offset
    K: tl.constexpr = GEOMETRIES[S].taps
    SPAN: tl.constexpr = GEOMETRIES[S].span
    BJ: tl.constexpr = GEOMETRIES[S].block_pixels
    BC: tl.constexpr = GEOMETRIES[S].block_channels
    b_dot = tl.zeros([BJ], tl.float32)
    b_sum = tl.zeros([BJ], tl.float32)
    b_square = tl.zeros([BJ], tl.float32)
    b_total = tl.zeros([BC], tl.float32)
    if K > 0:
        o_y, o_x, m_k, b_r = window_taps(row, column, level.size, GEOMETRIES, S)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        b_u = tl.load(vector_ptr + OFFSET + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
        if K > 0:
            b_x = load_pixels(level, i_b, o_y, o_x, m_k, o_c, m_c)  # [BK, BC]
            b_v = tl.dot(b_r, b_x, input_precision="tf32") - b_shift[:, None]  # [BJ, BC]
        else:
            b_v = tl.zeros([BJ, BC], tl.float32)
            for i_tap in range(SPAN * SPAN):
                t_y, t_x, b_w = pixel_tap(i_tap, row, column, level.size, GEOMETRIES, S)
                b_v += b_w[:, None] * (load_pixels(level, i_b, t_y, t_x, b_w > 0.0, o_c, m_c) - b_shift[:, None])
        if C % BC != 0:
            b_v = tl.where(m_c[None, :], b_v, 0.0)
        b_dot += tl.sum(b_v * b_u[None, :], axis=1)
        b_sum += tl.sum(b_v, axis=1)
        b_square += tl.sum(b_v * b_v, axis=1)
        b_total += b_u
    return b_dot, b_sum, b_square, tl.sum(b_total)


@triton.jit
def _pool(level, out_ptr, b_weight, constant, i_b, row, column, shift, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """Stores one level's share of sum_j b_weight_j * (pixel_j - shift) - constant; b_weight is [BJ]."""
    C: tl.constexpr = GEOMETRIES[S].channels
    OFFSET: tl.constexpr = GEOMETRIES[S].offset
    K: tl.constexpr = GEOMETRIES[S].taps
    SPAN: tl.constexpr = GEOMETRIES[S].span
    BC: tl.constexpr = GEOMETRIES[S].block_channels
    if K > 0:
        o_y, o_x, m_k, b_r = window_taps(row, column, level.size, GEOMETRIES, S)
        b_k = tl.sum(b_r * b_weight[:, None], axis=0)  # [BK]
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        if K > 0:
            b_x = load_pixels(level, i_b, o_y, o_x, m_k, o_c, m_c) - shift
            b_p = tl.sum(b_k[:, None] * b_x, axis=0)  # [BC]
        else:
            b_p = tl.zeros([BC], tl.float32)
            for i_tap in range(SPAN * SPAN):
                t_y, t_x, b_w = pixel_tap(i_tap, row, column, level.size, GEOMETRIES, S)
                b_x = load_pixels(level, i_b, t_y, t_x, b_w > 0.0, o_c, m_c) - shift
                b_p += tl.sum((b_w * b_weight)[:, None] * b_x, axis=0)
        tl.store(out_ptr + OFFSET + o_c, (b_p - constant).to(out_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def pool_windows_fwd_kernel(
    queries_ptr,
    levels,
    pooled_ptr,
    statistics_ptr,
    GEOMETRIES: tl.constexpr,
    VIEWS: tl.constexpr,
    FIRST_VIEW: tl.constexpr,
    CELLS: tl.constexpr,
    QUERY_SIDE: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
):
    BJ: tl.constexpr = GEOMETRIES[0].block_pixels
    PIXELS: tl.constexpr = GEOMETRIES[0].side * GEOMETRIES[0].side
    i_b, i_query, row, column = place(VIEWS, FIRST_VIEW, CELLS, QUERY_SIDE)
    b_shift = _shifts(levels[0], i_b, row, column, GEOMETRIES)
    b_dot = tl.zeros([BJ], tl.float32)
    b_sum = tl.zeros([BJ], tl.float32)
    b_square = tl.zeros([BJ], tl.float32)
    total = 0.0
    for s in tl.static_range(len(levels)):
        d, m, q, t = _scan(levels[s], queries_ptr + i_query * C, i_b, row, column, b_shift, GEOMETRIES, s)
        b_dot, b_sum, b_square, total = b_dot + d, b_sum + m, b_square + q, total + t
    b_mean = b_sum / C
    b_variance = b_square / C - b_mean * b_mean
    b_rstd = inverse_deviation(b_variance, EPS)

    o_j = tl.arange(0, BJ)
    m_j = o_j < PIXELS
    b_a = softmax_of_window((b_dot - b_mean * total) * b_rstd, m_j)
    keep_statistics(statistics_ptr + i_query * (3 * PIXELS) + o_j, b_a, b_mean, b_rstd, m_j, PIXELS)

    b_weight = b_a * b_rstd
    shift = tl.sum(b_a * b_shift, axis=0)
    constant = tl.sum(b_weight * (b_mean + (b_shift - shift)), axis=0)
    for s in tl.static_range(len(levels)):
        _pool(levels[s], pooled_ptr + i_query * C, b_weight, constant, i_b, row, column, shift, GEOMETRIES, s)


@triton.jit
def pool_windows_bwd_kernel(
    grad_ptr,
    levels,
    grad_queries_ptr,
    statistics_ptr,
    GEOMETRIES: tl.constexpr,
    VIEWS: tl.constexpr,
    FIRST_VIEW: tl.constexpr,
    CELLS: tl.constexpr,
    QUERY_SIDE: tl.constexpr,
    C: tl.constexpr,
):
    BJ: tl.constexpr = GEOMETRIES[0].block_pixels
    PIXELS: tl.constexpr = GEOMETRIES[0].side * GEOMETRIES[0].side
    i_b, i_query, row, column = place(VIEWS, FIRST_VIEW, CELLS, QUERY_SIDE)
    # The means that the forward pass kept are means less this number.
    b_shift = _shifts(levels[0], i_b, row, column, GEOMETRIES)
    b_dot = tl.zeros([BJ], tl.float32)
    total = 0.0
    for s in tl.static_range(len(levels)):
        d, _, _, t = _scan(levels[s], grad_ptr + i_query * C, i_b, row, column, b_shift, GEOMETRIES, s)
        b_dot, total = b_dot + d, total + t

    o_j = tl.arange(0, BJ)
    m_j = o_j < PIXELS
    p_statistics = statistics_ptr + i_query * (3 * PIXELS) + o_j
    b_a, b_mean, b_weight = weights_of_gradient(b_dot, total, p_statistics, m_j, PIXELS)
    shift = tl.sum(b_a * b_shift, axis=0)
    constant = tl.sum(b_weight * (b_mean + (b_shift - shift)), axis=0)
    for s in tl.static_range(len(levels)):
        _pool(levels[s], grad_queries_ptr + i_query * C, b_weight, constant, i_b, row, column, shift, GEOMETRIES, s)


def launches(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> Iterator[tuple[int, dict]]:
    """Programs and common arguments of each launch (see `window_launches`)."""
    fine, side, architecture = pyramid[0].shape[1], window_side(queries, pyramid, grid), architecture_of(queries)
    widths, element_sizes = [level.shape[-1] for level in pyramid], [level.element_size() for level in pyramid]
    offsets = [sum(widths[:s]) for s in range(len(pyramid))]
    for reduction, (programs, arguments) in zip((1, grid), window_launches(queries, pyramid, grid)):
        tile = patch_mining_tile(architecture, max(element_sizes), side, widths, reduced=reduction > 1)
        geometries = tuple(
            geometry(level, at, fine, reduction, side, tile.channels) for level, at in zip(pyramid, offsets)
        )
        arguments |= {
            "GEOMETRIES": geometries,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            # A limit that is no limit would let the compiler take all registers.
            "maxnreg": tile.registers if tile.registers < 255 else None,
        }
        yield programs, arguments


def pool_windows_fwd(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools the window of every query.

    Args:
        queries: [B, V, N, C], projected to C = sum(C_s) channels, fp16/bf16/fp32; V = grid * grid cells row by row,
            then possibly the global view, which sees the map reduced by `grid`.
        pyramid: [B, n_s, n_s, C_s], finest first, each fp16/bf16/fp32; read in place where the channels' stride is 1,
            otherwise copied.
        grid: cells per side. The side of a window is M = n_0 / (grid * sqrt(N)).

    Returns:
        pooled [B, V, N, C] in the widest dtype of queries and levels; statistics [B, V, N, 3, M * M], fp32: the
        softmax's weights, the pixels' means less one number per pixel, and the inverse standard deviations.
    """
    queries, pyramid = queries.contiguous(), channels_last(pyramid)
    pooled, statistics = empty_results(queries, pyramid, grid)
    for programs, arguments in launches(queries, pyramid, grid):
        pool_windows_fwd_kernel[(programs,)](
            queries, pooled_ptr=pooled, statistics_ptr=statistics, EPS=LAYER_NORM_EPS, **arguments
        )
    return pooled, statistics


def pool_windows_bwd(
    grad: torch.Tensor, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], statistics: torch.Tensor, grid: int
) -> torch.Tensor:
    """The gradient to the queries, of their shape and dtype, from the gradient [B, V, N, C] of `pooled`.

    The other arguments are those of `pool_windows_fwd`.
    """
    grad, pyramid = grad.contiguous(), channels_last(pyramid)
    grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for programs, arguments in launches(queries, pyramid, grid):
        pool_windows_bwd_kernel[(programs,)](
            grad, grad_queries_ptr=grad_queries, statistics_ptr=statistics, **arguments
        )
    return grad_queries
