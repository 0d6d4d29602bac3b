"""What both kernels of patch info mining share: a program's window, the softmax over its pixels, and the launches.

No kernel of its own is here. The statistics of a query, [3, M * M] in float32, are what the forward pass keeps for the
backward pass: the softmax's weights, the pixels' means, and the inverse standard deviations.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .windows import Level

LAYER_NORM_EPS = 1e-5


@triton.jit
def place(VIEWS: tl.constexpr, FIRST_VIEW: tl.constexpr, CELLS: tl.constexpr, QUERY_SIDE: tl.constexpr):
    """This program's picture and query, and the row and column of its window.

    Rows and columns count on the raster of the launch's CELLS x CELLS views.
    """
    i = tl.program_id(0).to(tl.int64)
    QUERIES: tl.constexpr = QUERY_SIDE * QUERY_SIDE
    i_b = i // (CELLS * CELLS * QUERIES)
    i_cell = i // QUERIES % (CELLS * CELLS)
    i_n = i % QUERIES
    row = (i_cell // CELLS * QUERY_SIDE + i_n // QUERY_SIDE).to(tl.int32)
    column = (i_cell % CELLS * QUERY_SIDE + i_n % QUERY_SIDE).to(tl.int32)
    return i_b, (i_b * VIEWS + FIRST_VIEW + i_cell) * QUERIES + i_n, row, column


@triton.jit
def inverse_deviation(b_variance, EPS: tl.constexpr):
    """The inverse standard deviations of pixels; NaN stays visible."""
    # tl.maximum with 0 would hide NaN.
    return tl.rsqrt(tl.where(b_variance < 0.0, 0.0, b_variance) + EPS)


@triton.jit
def softmax_of_window(b_score, m_j):
    """The softmax's weights [BJ] of the pixels that there are; the others have none."""
    b_score = tl.where(m_j, b_score, float("-inf"))
    b_a = tl.exp(b_score - tl.max(b_score, axis=0))
    return b_a / tl.sum(b_a, axis=0)


@triton.jit
def keep_statistics(p_statistics, b_a, b_mean, b_rstd, m_j, PIXELS: tl.constexpr):
    """Stores what the backward pass needs, each [BJ]."""
    tl.store(p_statistics, b_a, mask=m_j)
    tl.store(p_statistics + PIXELS, b_mean, mask=m_j)
    tl.store(p_statistics + 2 * PIXELS, b_rstd, mask=m_j)


@triton.jit
def weights_of_gradient(b_dot, total, p_statistics, m_j, PIXELS: tl.constexpr):
    """The softmax's weights, the means, and the weights of pixels in the gradient to the query, each [BJ].

    Takes the products of the result's gradient with the pixels, and the sum of the gradient's elements.
    """
    b_a = tl.load(p_statistics, mask=m_j, other=0.0)
    b_mean = tl.load(p_statistics + PIXELS, mask=m_j, other=0.0)
    b_rstd = tl.load(p_statistics + 2 * PIXELS, mask=m_j, other=0.0)
    b_da = (b_dot - b_mean * total) * b_rstd
    return b_a, b_mean, b_a * (b_da - tl.sum(b_a * b_da, axis=0)) * b_rstd


def window_side(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> int:
    """Pixels along the side of a window, M = n_0 / (grid * sqrt(N))."""
    return pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2]))


def architecture_of(tensor: torch.Tensor) -> int | None:
    """The compute capability that kernels are compiled for, 90 for 9.0; None where they are interpreted."""
    return triton.runtime.driver.active.get_current_target().arch if tensor.is_cuda else None


def window_launches(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> Iterator[tuple[int, dict]]:
    """Programs and the arguments that both kernels have, for each launch.

    One launch is for the cells, and one for the global view, if there is one, whose map is reduced. There is none for a
    batch of no picture.
    """
    b, views, n, channels = queries.shape
    levels = tuple(Level(level, *level.stride()[:3], level.shape[1]) for level in pyramid)
    for first, cells in [(0, grid), (grid * grid, 1)][: (1 + (views > grid * grid)) * (b > 0)]:
        arguments = {
            "levels": levels,
            "VIEWS": views,
            "FIRST_VIEW": first,
            "CELLS": cells,
            "QUERY_SIDE": math.isqrt(n),
            "C": channels,
        }
        yield b * cells * cells * n, arguments


def channels_last(pyramid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [level if level.stride(-1) == 1 else level.contiguous() for level in pyramid]


def empty_results(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the forward pass writes: pooled [B, V, N, C] in the widest dtype, and statistics [B, V, N, 3, M * M]."""
    dtype = functools.reduce(torch.promote_types, (level.dtype for level in pyramid), queries.dtype)
    shape = *queries.shape[:3], 3, window_side(queries, pyramid, grid) ** 2
    return queries.new_empty(queries.shape, dtype=dtype), queries.new_empty(shape, dtype=torch.float32)
