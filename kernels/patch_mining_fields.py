"""Means and inner products of the pyramid's own pixels: what LayerNorm of its resized pixels is made of.

A resized pixel is a weighted sum of coarse pixels x_k, so the mean over its channels is the same sum of their means
t_k, and its centred square is the sum of w_k w_l g_kl with g_kl = sum_c (x_k - t_k) (x_l - t_l). For a level [B, n, n,
C] with unit channel stride, one pass writes t and all g of pixels that lie less than `gram` rows and columns apart, as
float32 planes [B, planes, n, n]; `plane` says which. A program takes the 8 x 8 pixels of one tile.

The products of a tile run on tensor cores: bfloat16 as it is, float16 as TF32. Each pixel's channels are first shifted
by a number b of its own: g = sum (x_k - b_k) (x_l - b_l) - C (t_k - b_k) (t_l - b_l). b is zero for pixels without a
common offset, and the differences are exact for nearly all others, so nothing cancels and nothing is lost.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .coarse_tiles import coarse_mining_tile
from .coarse_windows import CoarseGeometry
from .windows import Level

# Pixels along a tile's side.
TILE = tl.constexpr(8)
# Columns of ones: the least that a matrix product takes.
ONES = tl.constexpr(16)
# Where the square of a pixel's mean is larger than this times its variance, the common offset is subtracted.
LARGE_OFFSET = tl.constexpr(8.0)


def planes(gram: int) -> int:
    """Planes of a level: the means, and the products with pixels less than `gram` rows and columns apart."""
    return 1 + gram + (gram - 1) * (2 * gram - 1)


@triton.jit
def plane(down, across, GRAM: tl.constexpr):
    """The plane of the products of pixels that are `down` rows and `across` columns apart.

    The product stands at the upper row and at the left column of the two. `across` may be negative if `down` is not 0.
    """
    return 1 + down * (2 * GRAM - 1) + across


@triton.jit
def _load(level, o_p, o_c, m_c):
    return tl.load(level.pixels + o_p[:, None] + o_c[None, :], mask=m_c[None, :], other=0.0)


@triton.jit
def _offsets(b_x, m_c, COUNT: tl.constexpr):
    """The number that is subtracted from each pixel's channels [P], from its first ones [P, BC]."""
    b_x = b_x.to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / COUNT
    b_d = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    # With the constant first, the interpreter of Triton 3.8 would fail.
    b_large = b_mean * b_mean * COUNT > tl.sum(b_d * b_d, axis=1) * LARGE_OFFSET
    return tl.where(b_large, b_mean, 0.0)


@triton.jit
def product(b_a, b_b, b_sum, WIDEN: tl.constexpr):
    """b_sum + b_a b_b for 16-bit numbers; the interpreter cannot multiply bfloat16, and has them widened."""
    if WIDEN:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def _write_tile(level, fields_ptr, i, tiles, GEOMETRIES: tl.constexpr, S: tl.constexpr, WIDEN: tl.constexpr):
    """Writes the planes of one tile of a level that has tiles x tiles of them."""
    C: tl.constexpr = GEOMETRIES[S].channels
    GRAM: tl.constexpr = GEOMETRIES[S].gram
    BC: tl.constexpr = GEOMETRIES[S].tile_channels
    P: tl.constexpr = TILE * TILE
    # Neighbouring tiles share the other rows or columns.
    STEP: tl.constexpr = TILE + 1 - GRAM
    n = level.size
    i_b = tl.program_id(1).to(tl.int64)
    top, left = i // tiles * STEP, i % tiles * STEP
    o_i = tl.arange(0, P)
    # A pixel beyond the border is the one at the border. It has no weight anywhere.
    o_y, o_x = tl.minimum(top + o_i // TILE, n - 1), tl.minimum(left + o_i % TILE, n - 1)
    o_p = i_b * level.stride_b + o_y.to(tl.int64) * level.stride_y + o_x.to(tl.int64) * level.stride_x
    o_c = tl.arange(0, BC)
    element = level.pixels.dtype.element_ty
    # Half of a difference of two numbers of float16 fits in it.
    UNIT: tl.constexpr = 0.5 if element == tl.float16 else 1.0
    b_b = _offsets(_load(level, o_p, o_c, o_c < C), o_c < C, min(BC, C)).to(element)
    b_m = tl.zeros([P, ONES], tl.float32)
    b_g = tl.zeros([P, P], tl.float32)
    for i_c in range(0, C, BC):
        m_c = i_c + o_c < C
        b_x = _load(level, o_p, i_c + o_c, m_c)
        if WIDEN:
            b_v = ((b_x.to(tl.float32) - b_b.to(tl.float32)[:, None]) * UNIT).to(element)
        else:
            b_v = b_x * UNIT - (b_b * UNIT)[:, None]
        if C % BC != 0:
            b_v = tl.where(m_c[None, :], b_v, 0.0)
        b_g = product(b_v, tl.trans(b_v), b_g, WIDEN)
        b_m = product(b_v, tl.full([BC, ONES], 1.0, tl.float32).to(element), b_m, WIDEN)

    b_m = tl.sum(b_m, axis=1) / ONES
    # In tile coordinates: a pair of pixels p, the upper one, and q, and the left column of the two.
    p_y, p_x, q_y, q_x = (o_i // TILE)[:, None], (o_i % TILE)[:, None], (o_i // TILE)[None, :], (o_i % TILE)[None, :]
    down, across, x = q_y - p_y, q_x - p_x, tl.minimum(p_x, q_x)
    m_g = (down >= 0) & (down < GRAM) & (tl.abs(across) < GRAM) & ((down > 0) | (across >= 0))
    m_g &= (p_y < STEP) & (x < STEP) & (top + p_y < n) & (left + x < n)
    # The planes of a picture lie one behind the other.
    fields_ptr += i_b * (plane(GRAM, 1 - GRAM, GRAM) * n * n)
    o_g = (plane(down, across, GRAM) * n + top + p_y) * n + left + x
    b_g = (b_g - b_m[:, None] * b_m[None, :] / C) / (UNIT * UNIT)
    tl.store(fields_ptr + o_g, b_g, mask=m_g)
    m_p = (top + o_i // TILE < n) & (left + o_i % TILE < n) & (o_i // TILE < STEP) & (o_i % TILE < STEP)
    tl.store(fields_ptr + o_y * n + o_x, b_b.to(tl.float32) + b_m / (C * UNIT), mask=m_p)


@triton.jit
def pixel_fields_fwd_kernel(levels, fields, firsts, tiles, GEOMETRIES: tl.constexpr, WIDEN: tl.constexpr):
    i = tl.program_id(0)
    for s in tl.static_range(len(levels)):
        if (i >= firsts[s]) & (i < firsts[s + 1]):
            _write_tile(levels[s], fields[s], i - firsts[s], tiles[s], GEOMETRIES, s, WIDEN)


def pixel_fields_fwd(levels: Sequence[Level], geometries: Sequence[CoarseGeometry]) -> tuple[torch.Tensor, ...]:
    """The planes [B, planes(gram), n, n] of every level, float32.

    Args:
        levels: of the pyramid, all float16 or all bfloat16, with unit channel stride.
        geometries: of the same levels. `gram` must reach as far as the pixels of any launch that reads the planes.
    """
    pixels, batch = levels[0].pixels, len(levels[0].pixels)
    fields = tuple(
        pixels.new_empty(batch, planes(geometry.gram), level.size, level.size, dtype=torch.float32)
        for level, geometry in zip(levels, geometries)
    )
    architecture = triton.runtime.driver.active.get_current_target().arch if pixels.is_cuda else None
    tile = coarse_mining_tile(architecture, None, wide=True)
    tiles = [triton.cdiv(level.size, TILE.value + 1 - geometry.gram) for level, geometry in zip(levels, geometries)]
    # These numbers do not depend on the batch, so neither does the compiled kernel.
    # The coarsest level comes first, because its programs have the most channels and take the longest.
    firsts = list(itertools.accumulate((count * count for count in reversed(tiles)), initial=0))
    if batch > 0:
        pixel_fields_fwd_kernel[(firsts[-1], batch)](
            tuple(reversed(levels)),
            tuple(reversed(fields)),
            tuple(firsts),
            tuple(reversed(tiles)),
            GEOMETRIES=tuple(reversed(geometries)),
            WIDEN=triton.knobs.runtime.interpret,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return fields
