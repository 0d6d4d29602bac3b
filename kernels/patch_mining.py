"""Windows of the pyramid, normalised, scored by their queries and pooled: p = sum_j softmax_j(u . x_j) x_j.

x_j are the M x M pixels of a query's window of the pyramid, upsampled to its finest level, concatenated and LayerNorm'ed over all
channels. Levels are read at their own resolution, [B, n_s, n_s, C_s] with unit channel stride, the halo of the bilinear resizing clamped
at the border; the upsampled map, its windows, keys and values never exist. One program per window reads its pixels twice: for scores and
statistics, then, from the cache, for the weighted sum. All float32 from the load on. The backward pass to the queries has the same two passes.

Coarse pixels become window pixels by a matrix product where that is exact in TF32 (16-bit maps, dyadic weights), else tap by tap.
A picture of few queries leaves most of a GPU idle, at under one program per multiprocessor: there the PyTorch form may be faster.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .configs import patch_mining_tile

LAYER_NORM_EPS = 1e-5


@triton.jit
def _weight(o_pixel, o_tap, n, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """Weight of coarse pixel `o_tap` of n in pixel `o_pixel` of the map upsampled by DEN / NUM, then reduced; exact if dyadic."""
    NUM: tl.constexpr = GEOMETRIES[S][2]
    DEN: tl.constexpr = GEOMETRIES[S][3]
    REDUCTION: tl.constexpr = WINDOW[1]
    # positions are whole numbers in units of 1 / unit coarse pixels
    unit: tl.constexpr = 2 * DEN
    o_fine = o_pixel * REDUCTION + (REDUCTION - 1) // 2
    o_at = tl.minimum(tl.maximum((2 * o_fine + 1) * NUM - DEN, 0), unit * (n - 1))
    b_w = tl.maximum(unit - tl.abs(o_at - unit * o_tap), 0)
    if REDUCTION % 2 == 0:
        # the middle lies between two fine pixels
        o_at = tl.minimum(tl.maximum((2 * o_fine + 3) * NUM - DEN, 0), unit * (n - 1))
        b_w += tl.maximum(unit - tl.abs(o_at - unit * o_tap), 0)
        scale: tl.constexpr = 0.5 / unit
    else:
        scale: tl.constexpr = 1.0 / unit
    return b_w.to(tl.float32) * scale


@triton.jit
def _first(o_pixel, n, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """The first coarse pixel with a weight in pixel `o_pixel`."""
    NUM: tl.constexpr = GEOMETRIES[S][2]
    DEN: tl.constexpr = GEOMETRIES[S][3]
    REDUCTION: tl.constexpr = WINDOW[1]
    o_fine = o_pixel * REDUCTION + (REDUCTION - 1) // 2
    return tl.minimum(tl.maximum((2 * o_fine + 1) * NUM - DEN, 0) // (2 * DEN), n - 1)


@triton.jit
def _window(row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """Coarse pixels of a window, their rows, columns and mask [BK], and what they weigh in its pixels [BJ, BK]."""
    K: tl.constexpr = GEOMETRIES[S][4]
    BK: tl.constexpr = GEOMETRIES[S][5]
    SIDE: tl.constexpr = WINDOW[0]
    BJ: tl.constexpr = WINDOW[2]
    o_k = tl.arange(0, BK)
    o_j = tl.arange(0, BJ)
    o_y = _first(row * SIDE, n, GEOMETRIES, S, WINDOW) + o_k // K
    o_x = _first(column * SIDE, n, GEOMETRIES, S, WINDOW) + o_k % K
    b_y = _weight((row * SIDE + o_j // SIDE)[:, None], o_y[None, :], n, GEOMETRIES, S, WINDOW)
    b_x = _weight((column * SIDE + o_j % SIDE)[:, None], o_x[None, :], n, GEOMETRIES, S, WINDOW)
    b_r = tl.where((o_j < SIDE * SIDE)[:, None] & (o_k < K * K)[None, :], b_y * b_x, 0.0)
    # what has no weight is not loaded: it may lie outside the map, or not be finite
    return o_y, o_x, tl.max(b_r, axis=0) > 0.0, b_r


@triton.jit
def _tap(i_tap, row, column, n, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """One of the coarse pixels of every window pixel: rows, columns and weights [BJ]."""
    SPAN: tl.constexpr = GEOMETRIES[S][6]
    SIDE: tl.constexpr = WINDOW[0]
    BJ: tl.constexpr = WINDOW[2]
    o_j = tl.arange(0, BJ)
    o_row = row * SIDE + o_j // SIDE
    o_column = column * SIDE + o_j % SIDE
    o_y = _first(o_row, n, GEOMETRIES, S, WINDOW) + i_tap // SPAN
    o_x = _first(o_column, n, GEOMETRIES, S, WINDOW) + i_tap % SPAN
    b_w = _weight(o_row, o_y, n, GEOMETRIES, S, WINDOW) * _weight(o_column, o_x, n, GEOMETRIES, S, WINDOW)
    return o_y, o_x, tl.where(o_j < SIDE * SIDE, b_w, 0.0)


@triton.jit
def _load(level, i_b, o_y, o_x, m_p, o_c, m_c):
    """Pixels of a picture's level in float32, [pixels, BC]."""
    o_p = i_b * level[1] + o_y.to(tl.int64) * level[2] + o_x.to(tl.int64) * level[3]
    return tl.load(level[0] + o_p[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def _shift(level, i_b, row, column, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """Mean of some channels of the window's first pixel: taken off everything, it keeps a large common offset from drowning the rest."""
    C: tl.constexpr = GEOMETRIES[S][0]
    BC: tl.constexpr = WINDOW[3]
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    o_y = _first(row * WINDOW[0], level[4], GEOMETRIES, S, WINDOW)
    o_x = _first(column * WINDOW[0], level[4], GEOMETRIES, S, WINDOW)
    o_p = i_b * level[1] + o_y.to(tl.int64) * level[2] + o_x.to(tl.int64) * level[3]
    b_x = tl.load(level[0] + o_p + o_c, mask=m_c, other=0.0).to(tl.float32)
    count: tl.constexpr = min(BC, C)
    return tl.sum(b_x) / count


@triton.jit
def _scan(level, vector_ptr, i_b, row, column, shift, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """One level's share of: the pixels' inner products with a vector, their sums, their sums of squares [BJ]; the vector's sum."""
    C: tl.constexpr = GEOMETRIES[S][0]
    OFFSET: tl.constexpr = GEOMETRIES[S][1]
    K: tl.constexpr = GEOMETRIES[S][4]
    SPAN: tl.constexpr = GEOMETRIES[S][6]
    BJ: tl.constexpr = WINDOW[2]
    BC: tl.constexpr = WINDOW[3]
    b_dot = tl.zeros([BJ], tl.float32)
    b_sum = tl.zeros([BJ], tl.float32)
    b_square = tl.zeros([BJ], tl.float32)
    total = 0.0
    if K > 0:
        o_y, o_x, m_k, b_r = _window(row, column, level[4], GEOMETRIES, S, WINDOW)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        b_u = tl.load(vector_ptr + OFFSET + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BC]
        if K > 0:
            b_x = _load(level, i_b, o_y, o_x, m_k, o_c, m_c)  # [BK, BC]
            b_v = tl.dot(b_r, b_x, input_precision="tf32") - shift  # [BJ, BC]
        else:
            b_v = tl.zeros([BJ, BC], tl.float32)
            for i_tap in range(SPAN * SPAN):
                t_y, t_x, b_w = _tap(i_tap, row, column, level[4], GEOMETRIES, S, WINDOW)
                b_v += b_w[:, None] * (_load(level, i_b, t_y, t_x, b_w > 0.0, o_c, m_c) - shift)
        if C % BC != 0:
            b_v = tl.where(m_c[None, :], b_v, 0.0)
        b_dot += tl.sum(b_v * b_u[None, :], axis=1)
        b_sum += tl.sum(b_v, axis=1)
        b_square += tl.sum(b_v * b_v, axis=1)
        total += tl.sum(b_u)
    return b_dot, b_sum, b_square, total


@triton.jit
def _pool(level, out_ptr, b_weight, constant, i_b, row, column, shift, GEOMETRIES: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr):
    """Stores one level's share of the window pixels' sum with weights [BJ], less a constant."""
    C: tl.constexpr = GEOMETRIES[S][0]
    OFFSET: tl.constexpr = GEOMETRIES[S][1]
    K: tl.constexpr = GEOMETRIES[S][4]
    SPAN: tl.constexpr = GEOMETRIES[S][6]
    BJ: tl.constexpr = WINDOW[2]
    BC: tl.constexpr = WINDOW[3]
    if K > 0:
        o_y, o_x, m_k, b_r = _window(row, column, level[4], GEOMETRIES, S, WINDOW)
        b_k = tl.sum(b_r * b_weight[:, None], axis=0)  # [BK]
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        if K > 0:
            b_x = _load(level, i_b, o_y, o_x, m_k, o_c, m_c) - shift
            b_p = tl.sum(b_k[:, None] * b_x, axis=0)  # [BC]
        else:
            b_p = tl.zeros([BC], tl.float32)
            for i_tap in range(SPAN * SPAN):
                t_y, t_x, b_w = _tap(i_tap, row, column, level[4], GEOMETRIES, S, WINDOW)
                b_x = _load(level, i_b, t_y, t_x, b_w > 0.0, o_c, m_c) - shift
                b_p += tl.sum((b_w * b_weight)[:, None] * b_x, axis=0)
        tl.store(out_ptr + OFFSET + o_c, (b_p - constant).to(out_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def _place(VIEWS: tl.constexpr):
    """This program's picture, its query, and the row and column of the window on the raster of the launch's cells."""
    FIRST: tl.constexpr = VIEWS[1]
    CELLS: tl.constexpr = VIEWS[2]
    SIDE: tl.constexpr = VIEWS[3]
    i = tl.program_id(0).to(tl.int64)
    i_b = i // (CELLS * CELLS * SIDE * SIDE)
    i_cell = i // (SIDE * SIDE) % (CELLS * CELLS)
    i_n = i % (SIDE * SIDE)
    row = (i_cell // CELLS * SIDE + i_n // SIDE).to(tl.int32)
    column = (i_cell % CELLS * SIDE + i_n % SIDE).to(tl.int32)
    return i_b, (i_b * VIEWS[0] + FIRST + i_cell) * (SIDE * SIDE) + i_n, row, column


@triton.jit
def pool_windows_fwd_kernel(
    queries_ptr, levels, pooled_ptr, statistics_ptr, GEOMETRIES: tl.constexpr, VIEWS: tl.constexpr, WINDOW: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    BJ: tl.constexpr = WINDOW[2]
    PIXELS: tl.constexpr = WINDOW[0] * WINDOW[0]
    i_b, i_query, row, column = _place(VIEWS)
    shift = _shift(levels[0], i_b, row, column, GEOMETRIES, 0, WINDOW)
    b_dot = tl.zeros([BJ], tl.float32)
    b_sum = tl.zeros([BJ], tl.float32)
    b_square = tl.zeros([BJ], tl.float32)
    total = 0.0
    for s in tl.static_range(len(levels)):
        d, m, q, t = _scan(levels[s], queries_ptr + i_query * C, i_b, row, column, shift, GEOMETRIES, s, WINDOW)
        b_dot, b_sum, b_square, total = b_dot + d, b_sum + m, b_square + q, total + t
    b_mean = b_sum / C
    b_variance = b_square / C - b_mean * b_mean
    # a maximum with 0 would hide NaN
    b_rstd = tl.rsqrt(tl.where(b_variance < 0.0, 0.0, b_variance) + EPS)

    o_j = tl.arange(0, BJ)
    m_j = o_j < PIXELS
    b_score = tl.where(m_j, (b_dot - b_mean * total) * b_rstd, float("-inf"))
    b_a = tl.exp(b_score - tl.max(b_score, axis=0))
    b_a = b_a / tl.sum(b_a, axis=0)
    p_statistics = statistics_ptr + i_query * (3 * PIXELS) + o_j
    tl.store(p_statistics, b_a, mask=m_j)
    tl.store(p_statistics + PIXELS, b_mean, mask=m_j)
    tl.store(p_statistics + 2 * PIXELS, b_rstd, mask=m_j)

    b_weight = b_a * b_rstd
    constant = tl.sum(b_weight * b_mean, axis=0)
    for s in tl.static_range(len(levels)):
        _pool(levels[s], pooled_ptr + i_query * C, b_weight, constant, i_b, row, column, shift, GEOMETRIES, s, WINDOW)


@triton.jit
def pool_windows_bwd_kernel(
    grad_ptr, levels, grad_queries_ptr, statistics_ptr, GEOMETRIES: tl.constexpr, VIEWS: tl.constexpr, WINDOW: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    BJ: tl.constexpr = WINDOW[2]
    PIXELS: tl.constexpr = WINDOW[0] * WINDOW[0]
    i_b, i_query, row, column = _place(VIEWS)
    # the same as in the forward pass: the means kept there lack it
    shift = _shift(levels[0], i_b, row, column, GEOMETRIES, 0, WINDOW)
    b_dot = tl.zeros([BJ], tl.float32)
    total = 0.0
    for s in tl.static_range(len(levels)):
        d, _, _, t = _scan(levels[s], grad_ptr + i_query * C, i_b, row, column, shift, GEOMETRIES, s, WINDOW)
        b_dot, total = b_dot + d, total + t

    o_j = tl.arange(0, BJ)
    m_j = o_j < PIXELS
    p_statistics = statistics_ptr + i_query * (3 * PIXELS) + o_j
    b_a = tl.load(p_statistics, mask=m_j, other=0.0)
    b_mean = tl.load(p_statistics + PIXELS, mask=m_j, other=0.0)
    b_rstd = tl.load(p_statistics + 2 * PIXELS, mask=m_j, other=0.0)
    b_da = (b_dot - b_mean * total) * b_rstd
    b_weight = b_a * (b_da - tl.sum(b_a * b_da, axis=0)) * b_rstd
    constant = tl.sum(b_weight * b_mean, axis=0)
    for s in tl.static_range(len(levels)):
        _pool(levels[s], grad_queries_ptr + i_query * C, b_weight, constant, i_b, row, column, shift, GEOMETRIES, s, WINDOW)


def _taps(pixel: int, n: int, ratio: tuple[int, int], reduction: int) -> tuple[int, int]:
    """First and last coarse pixel with a weight in a pixel: `_first` and `_weight`, on the host."""
    fine, (num, den) = pixel * reduction + (reduction - 1) // 2, ratio
    first = max((2 * fine + 1) * num - den, 0) // (2 * den)
    fine += reduction % 2 == 0
    last = -(-max((2 * fine + 1) * num - den, 0) // (2 * den))
    return min(first, n - 1), min(last, n - 1)


@functools.lru_cache(maxsize=256)
def _reach(fine: int, n: int, reduction: int, side: int) -> tuple[tuple[int, int], int, int]:
    """Ratio of a level to the finest, coarse pixels along a window's side and along one of its pixels', at most."""
    ratio = (n // math.gcd(fine, n), fine // math.gcd(fine, n))
    taps = [_taps(pixel, n, ratio, reduction) for pixel in range(fine // reduction)]
    window = max(taps[i + side - 1][1] - taps[i][0] + 1 for i in range(0, len(taps), side))
    return ratio, window, max(last - first + 1 for first, last in taps)


def _geometry(level: torch.Tensor, offset: int, fine: int, reduction: int, side: int):
    """What the kernels need to know of a level: channels, their offset, ratio NUM / DEN, window's side K (0: tap by tap), block of taps, pixel's side."""
    ratio, window, span = _reach(fine, level.shape[1], reduction, side)
    # weights are multiples of 1 / (2 * ratio[1]), half of that for an even reduction: their products have at most 11 bits, those of TF32
    dyadic = ratio[0] == 1 and ratio[1].bit_count() == 1 and ratio[1] * (2 - reduction % 2) <= 16
    product = level.element_size() == 2 and dyadic and span > 1 and window <= 8 and side <= 8
    return (level.shape[-1], offset, *ratio, window if product else 0, max(16, triton.next_power_of_2(window**2)) if product else 0, span)


def _launches(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> Iterator[tuple[int, dict]]:
    """Programs and arguments of the launches that the views need: the cells', and one of its own for the global view, whose map is reduced."""
    b, views, n, channels = queries.shape
    fine, n_side = pyramid[0].shape[1], math.isqrt(n)
    side = fine // (grid * n_side)
    architecture = triton.runtime.driver.active.get_current_target().arch if queries.is_cuda else None
    levels = tuple((level, *level.stride()[:3], level.shape[1]) for level in pyramid)
    offsets = [sum(level.shape[-1] for level in pyramid[:s]) for s in range(len(pyramid))]
    for first, cells, reduction in [(0, grid, 1), (grid * grid, 1, grid)][: 1 + (views > grid * grid)]:
        geometries = tuple(_geometry(level, offset, fine, reduction, side) for level, offset in zip(pyramid, offsets))
        tile = patch_mining_tile(architecture, pyramid[0].element_size(), side)
        arguments = {
            "levels": levels,
            "GEOMETRIES": geometries,
            "VIEWS": (views, first, cells, n_side),
            "WINDOW": (side, reduction, max(16, triton.next_power_of_2(side * side)), tile.channels),
            "C": channels,
            "EPS": LAYER_NORM_EPS,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if b > 0:
            yield b * cells * cells * n, arguments


def _channels_last(pyramid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [level if level.stride(-1) == 1 else level.contiguous() for level in pyramid]


def pool_windows_fwd(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools every query's window.

    Args:
        queries: [B, V, N, C], projected to C = sum(C_s) channels, fp16/bf16/fp32; V = grid * grid cells row by row, then possibly the
            global view, which sees the map reduced by `grid`.
        pyramid: [B, n_s, n_s, C_s], finest first, one of fp16/bf16/fp32; read in place where the channels' stride is 1, else copied.
        grid: cells per side. The window's side M = n_0 / (grid * sqrt(N)).

    Returns:
        pooled [B, V, N, C] in the pyramid's dtype; statistics [B, V, N, 3, M * M], fp32: softmax weights, means, inverse standard deviations.
    """
    queries, pyramid = queries.contiguous(), _channels_last(pyramid)
    side = pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2]))
    pooled = torch.empty_like(queries, dtype=pyramid[0].dtype)
    statistics = queries.new_empty(*queries.shape[:3], 3, side * side, dtype=torch.float32)
    for programs, arguments in _launches(queries, pyramid, grid):
        pool_windows_fwd_kernel[(programs,)](queries, pooled_ptr=pooled, statistics_ptr=statistics, **arguments)
    return pooled, statistics


def pool_windows_bwd(
    grad: torch.Tensor, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], statistics: torch.Tensor, grid: int
) -> torch.Tensor:
    """Gradient to the queries, of their shape and dtype, from the gradient [B, V, N, C] of `pooled`; the rest as in `pool_windows_fwd`."""
    grad, pyramid = grad.contiguous(), _channels_last(pyramid)
    grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for programs, arguments in _launches(queries, pyramid, grid):
        pool_windows_bwd_kernel[(programs,)](grad, grad_queries_ptr=grad_queries, statistics_ptr=statistics, **arguments)
    return grad_queries
