"""Pools windows as kernels/patch_mining.py does, p = sum_j softmax_j(u . x_j) x_j, by working on coarse pixels only.

Resizing is linear: u . x_j is a weighted sum of u . x_k over the coarse pixels k that make up pixel j, and the pooled
window is a weighted sum of coarse pixels. Means and variances of pixels come from the planes that
kernels/patch_mining_fields.py has written. So every level's channels are read twice, and no pixel x_j is ever made. One
program per window.

Both passes are products on tensor cores of 16-bit maps with a float32 vector, which is cut into 16-bit terms: their
products with the maps are exact and are added up in float32. In float16 the vector is scaled by a power of two first.
Float32 maps are not taken, and no window that spans more than 16 x 16 coarse pixels. The kernels are compiled for
compute capability 9.0 only. For a picture of few queries the PyTorch form may be faster.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .coarse_products import all_dots, moments, pool_level, window_pixels
from .coarse_tiles import COARSE_MINING, coarse_tiles
from .coarse_windows import coarse_geometries
from .patch_mining_fields import pixel_fields_fwd
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
)

# The most coarse pixels along a side of a window. More would not fit in registers.
MOST_TAPS = 16


@triton.jit
def pool_coarse_fwd_kernel(
    queries_ptr,
    levels,
    channels,
    fields,
    pooled_ptr,
    statistics_ptr,
    GEOMETRIES: tl.constexpr,
    VIEWS: tl.constexpr,
    FIRST_VIEW: tl.constexpr,
    CELLS: tl.constexpr,
    QUERY_SIDE: tl.constexpr,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
    EPS: tl.constexpr,
):
    BJ: tl.constexpr = GEOMETRIES[0].padded_side * GEOMETRIES[0].padded_side
    PIXELS: tl.constexpr = GEOMETRIES[0].side * GEOMETRIES[0].side
    i_b, i_query, row, column = place(VIEWS, FIRST_VIEW, CELLS, QUERY_SIDE)
    b_dot, total = all_dots(levels, channels, queries_ptr + i_query * C, i_b, row, column, C, GEOMETRIES, WIDEN)
    b_mean = tl.zeros([BJ], tl.float32)
    b_square = tl.zeros([BJ], tl.float32)
    for s in tl.static_range(len(levels)):
        # Means and centred squares of two sets of channels give those of their union.
        m, q = moments(levels[s], fields[s], i_b, row, column, GEOMETRIES, s)
        b_d = m - b_mean
        share = GEOMETRIES[s].channels / (GEOMETRIES[s].offset + GEOMETRIES[s].channels)
        b_mean += b_d * share
        b_square += q + b_d * b_d * (GEOMETRIES[s].offset * share)
    b_variance = b_square / C
    b_rstd = inverse_deviation(b_variance, EPS)

    o_j, m_j = window_pixels(GEOMETRIES)
    b_a = softmax_of_window((b_dot - b_mean * total) * b_rstd, m_j)
    keep_statistics(statistics_ptr + i_query * (3 * PIXELS) + o_j, b_a, b_mean, b_rstd, m_j, PIXELS)

    b_weight = tl.where(m_j, b_a * b_rstd, 0.0)
    constant = tl.sum(b_weight * b_mean, axis=0)
    for s in tl.static_range(len(levels)):
        pool_level(
            levels[s], channels[s], pooled_ptr + i_query * C, b_weight, constant, i_b, row, column, GEOMETRIES, s, WIDEN
        )


@triton.jit
def pool_coarse_bwd_kernel(
    grad_ptr,
    levels,
    channels,
    grad_queries_ptr,
    statistics_ptr,
    GEOMETRIES: tl.constexpr,
    VIEWS: tl.constexpr,
    FIRST_VIEW: tl.constexpr,
    CELLS: tl.constexpr,
    QUERY_SIDE: tl.constexpr,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    PIXELS: tl.constexpr = GEOMETRIES[0].side * GEOMETRIES[0].side
    i_b, i_query, row, column = place(VIEWS, FIRST_VIEW, CELLS, QUERY_SIDE)
    b_dot, total = all_dots(levels, channels, grad_ptr + i_query * C, i_b, row, column, C, GEOMETRIES, WIDEN)

    o_j, m_j = window_pixels(GEOMETRIES)
    p_statistics = statistics_ptr + i_query * (3 * PIXELS) + o_j
    _, b_mean, b_weight = weights_of_gradient(b_dot, total, p_statistics, m_j, PIXELS)
    constant = tl.sum(b_weight * b_mean, axis=0)
    for s in tl.static_range(len(levels)):
        pool_level(
            levels[s],
            channels[s],
            grad_queries_ptr + i_query * C,
            b_weight,
            constant,
            i_b,
            row,
            column,
            GEOMETRIES,
            s,
            WIDEN,
        )


def launches(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> Iterator[tuple[int, dict]]:
    """Programs and common arguments of each launch that pools (see `window_launches`)."""
    tiles = coarse_tiles(queries, pyramid, grid, architecture_of(queries))
    geometries = coarse_geometries(queries, pyramid, grid, [tile.elements for tile in tiles])
    for of_launch, tile, (programs, arguments) in zip(geometries, tiles[1:], window_launches(queries, pyramid, grid)):
        arguments |= {
            "channels": tuple(level.shape[-1] for level in pyramid),
            "GEOMETRIES": of_launch,
            "WIDEN": triton.knobs.runtime.interpret,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        }
        yield programs, arguments


def why_not_coarse(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, architecture: int | None
) -> str | None:
    """Why these kernels do not take the tensors; None where they do.

    Args:
        queries, pyramid, grid: those of the operation.
        architecture: the compute capability that they would be compiled for, 90 for 9.0; None where nothing is.
    """
    if architecture is not None and architecture not in COARSE_MINING:
        return f"it is compiled and gated for compute capability 9.0 only, got {architecture // 10}.{architecture % 10}"
    dtypes = {level.dtype for level in pyramid}
    if len(dtypes) > 1 or dtypes - {torch.float16, torch.bfloat16}:
        return f"maps must be all float16 or all bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    tiles = coarse_tiles(queries, pyramid, grid, architecture)
    geometries = coarse_geometries(queries, pyramid, grid, [tile.elements for tile in tiles])
    taps = max(level.taps for launch in geometries for level in launch)
    return (
        f"a window may span up to {MOST_TAPS}x{MOST_TAPS} coarse pixels, got {taps}x{taps}"
        if taps > MOST_TAPS
        else None
    )


def pool_coarse_fwd(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`patch_mining.pool_windows_fwd` with the same arguments and results, for all maps in float16 or all in bfloat16.

    The means in the statistics are whole, not less a number.
    """
    queries, pyramid = queries.contiguous(), channels_last(pyramid)
    pooled, statistics = empty_results(queries, pyramid, grid)
    fields = None
    for programs, arguments in launches(queries, pyramid, grid):
        if fields is None:
            fields = pixel_fields_fwd(arguments["levels"], arguments["GEOMETRIES"])
        pool_coarse_fwd_kernel[(programs,)](
            queries,
            fields=fields,
            pooled_ptr=pooled,
            statistics_ptr=statistics,
            EPS=LAYER_NORM_EPS,
            **arguments,
        )
    return pooled, statistics


def pool_coarse_bwd(
    grad: torch.Tensor, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], statistics: torch.Tensor, grid: int
) -> torch.Tensor:
    """The gradient to the queries, of their shape and dtype, from the gradient [B, V, N, C] of `pooled`.

    The other arguments are those of `pool_coarse_fwd`, and the statistics that it returned.
    """
    grad, pyramid = grad.contiguous(), channels_last(pyramid)
    grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for programs, arguments in launches(queries, pyramid, grid):
        pool_coarse_bwd_kernel[(programs,)](grad, grad_queries_ptr=grad_queries, statistics_ptr=statistics, **arguments)
    return grad_queries
