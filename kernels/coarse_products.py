"""The products of coarse pixels that mining on them is made of: scores, moments and weighted sums of a window.

No kernel of its own is here; `patch_mining_coarse.py` has the algebra.
"""

import triton
import triton.language as tl

from .coarse_windows import coarse_pixels, listed, load_coarse, pixel_weights
from .patch_mining_fields import plane, product

# Columns of the small operand: the fewest that tensor cores take.
COLUMNS = tl.constexpr(8)
# Half of the rows of the small operand in the other product, the fewest that tensor cores take.
HALF = tl.constexpr(8)


@triton.jit
def _power(largest, dtype: tl.constexpr):
    """The power of two that brings numbers up to `largest` into the range of float16; 1 for bfloat16."""
    if dtype == tl.float16:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        return (tl.minimum(tl.maximum(254 + 13 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
    return 1.0


@triton.jit
def _columns(b_v, TERMS: tl.constexpr, dtype: tl.constexpr):
    """A float32 vector [N] as columns [N, COLUMNS] of a 16-bit dtype: itself, if there is one term.

    Otherwise any four neighbouring columns add up to it; its parts are exact.
    """
    b_high = b_v.to(dtype)
    if TERMS == 1:
        return tl.broadcast_to(b_high[:, None], [b_v.shape[0], COLUMNS])
    o_n = tl.arange(0, COLUMNS)[None, :] % 4
    b_rest = b_v - b_high.to(tl.float32)
    b_low = b_rest.to(dtype)
    b_lowest = (b_rest - b_low.to(tl.float32)).to(dtype)
    b_lower = tl.where(o_n == 1, b_low[:, None], tl.where(o_n == 2, b_lowest[:, None], 0.0))
    return tl.where(o_n == 0, b_high[:, None], b_lower)


@triton.jit
def _times(b_v, b_m, TERMS: tl.constexpr, WIDEN: tl.constexpr):
    """A float32 vector [K] times 16-bit numbers b_m [K, N], in every row of [HALF, N].

    The vector is cut into two or three terms. The upper rows of the product take the first, the lower rows the second.
    """
    o_r = tl.arange(0, 2 * HALF)[:, None]
    b_high = b_v.to(b_m.dtype)
    b_rest = b_v - b_high.to(tl.float32)
    b_low = b_rest.to(b_m.dtype)
    b_sum = tl.zeros([2 * HALF, b_m.shape[1]], tl.float32)
    b_sum = product(tl.where(o_r < HALF, b_high[None, :], b_low[None, :]), b_m, b_sum, WIDEN)
    if TERMS == 3:
        b_lowest = (b_rest - b_low.to(tl.float32)).to(b_m.dtype)
        b_sum = product(tl.where(o_r < HALF, b_lowest[None, :], 0.0), b_m, b_sum, WIDEN)
    return tl.sum(tl.reshape(b_sum, [2, HALF, b_m.shape[1]]), axis=0)


@triton.jit
def _dots(
    level, channels, vector_ptr, scale, i_b, row, column, GEOMETRIES: tl.constexpr, S: tl.constexpr, WIDEN: tl.constexpr
):
    """One level's share of `vector . pixel` for every pixel of the window [BJ]; and of the vector's sum."""
    C: tl.constexpr = GEOMETRIES[S].channels
    OFFSET: tl.constexpr = GEOMETRIES[S].offset
    BK: tl.constexpr = GEOMETRIES[S].block_taps
    BC: tl.constexpr = GEOMETRIES[S].block_channels
    element = level.pixels.dtype.element_ty
    o_y, o_x, m_k, _, _ = coarse_pixels(row, column, level.size, GEOMETRIES, S)
    TERMS: tl.constexpr = 1 if vector_ptr.dtype.element_ty == element else 3
    b_dots = tl.zeros([BK, COLUMNS], tl.float32)
    b_total = tl.zeros([BC], tl.float32)
    for i_c in range(0, C if WIDEN else channels, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = (o_c < C) if C % BC != 0 else tl.full([BC], True, tl.int1)
        b_u = tl.load(vector_ptr + OFFSET + o_c, mask=m_c, other=0.0)
        b_v = load_coarse(level, i_b, o_y, o_x, m_k, o_c, m_c)  # [BK, BC]
        b_u32 = b_u.to(tl.float32)
        b_total += b_u32
        b_dots = product(b_v, _columns(b_u32 * scale, TERMS, element), b_dots, WIDEN)
    b_k = tl.sum(b_dots, axis=1) / ((COLUMNS if TERMS == 1 else COLUMNS // 4) * scale)

    SPAN: tl.constexpr = GEOMETRIES[S].span
    STRIDE: tl.constexpr = GEOMETRIES[S].stride
    t_y, t_x, weights = pixel_weights(row, column, level.size, GEOMETRIES, S)
    # Where a pixel's first coarse pixel stands in the list of coarse pixels.
    at = (t_y - tl.min(o_y, axis=0)) * STRIDE + t_x - tl.min(o_x, axis=0)
    b_j = tl.zeros([t_y.shape[0]], tl.float32)
    for i in tl.static_range(SPAN * SPAN):
        m_w = weights[i] > 0.0
        b_d = tl.gather(b_k, tl.where(m_w, at + (i // SPAN * STRIDE + i % SPAN), 0), axis=0)
        b_j += tl.where(m_w, weights[i] * b_d, 0.0)
    return b_j, tl.sum(b_total)


@triton.jit
def moments(level, fields_ptr, i_b, row, column, GEOMETRIES: tl.constexpr, S: tl.constexpr):
    """Mean and centred sum of squares, over the channels of one level, of every pixel of the window [BJ]."""
    SPAN: tl.constexpr = GEOMETRIES[S].span
    GRAM: tl.constexpr = GEOMETRIES[S].gram
    n = level.size
    t_y, t_x, weights = pixel_weights(row, column, n, GEOMETRIES, S)
    p_t = fields_ptr + i_b * (plane(GRAM, 1 - GRAM, GRAM) * n * n) + t_y * n + t_x
    b_mean = tl.zeros([t_y.shape[0]], tl.float32)
    b_square = tl.zeros([t_y.shape[0]], tl.float32)
    for i in tl.static_range(SPAN * SPAN):
        m_i = weights[i] > 0.0
        b_mean += weights[i] * tl.load(p_t + (i // SPAN * n + i % SPAN), mask=m_i, other=0.0)
        for k in tl.static_range(i, SPAN * SPAN):
            p_g = p_t + plane(k // SPAN - i // SPAN, k % SPAN - i % SPAN, GRAM) * n * n
            p_g += i // SPAN * n + min(i % SPAN, k % SPAN)
            b_g = tl.load(p_g, mask=m_i & (weights[k] > 0.0), other=0.0)
            b_square += weights[i] * weights[k] * b_g * (1.0 if i == k else 2.0)
    return b_mean, b_square


@triton.jit
def pool_level(
    level,
    channels,
    out_ptr,
    b_weight,
    constant,
    i_b,
    row,
    column,
    GEOMETRIES: tl.constexpr,
    S: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Stores one level's share of sum_j b_weight_j * pixel_j - constant; b_weight is [BJ]."""
    C: tl.constexpr = GEOMETRIES[S].channels
    OFFSET: tl.constexpr = GEOMETRIES[S].offset
    BC: tl.constexpr = GEOMETRIES[S].pooled_channels
    PADDED: tl.constexpr = GEOMETRIES[S].padded_side
    element = level.pixels.dtype.element_ty
    o_y, o_x, m_k, b_y, b_x = coarse_pixels(row, column, level.size, GEOMETRIES, S)
    # The weights of coarse pixels, first along rows, then along columns.
    b_across = tl.sum(tl.reshape(b_weight, [PADDED, PADDED])[:, :, None] * b_x[None, :, :], axis=1)
    b_k = listed(tl.sum(b_y[:, :, None] * b_across[:, None, :], axis=0), GEOMETRIES, S)
    scale = _power(tl.max(tl.abs(b_k), axis=0), element)
    # A result of 16 bits needs no more than two terms of as many.
    TERMS: tl.constexpr = 3 if out_ptr.dtype.element_ty == tl.float32 else 2
    for i_c in range(0, C if WIDEN else channels, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = (o_c < C) if C % BC != 0 else tl.full([BC], True, tl.int1)
        b_v = load_coarse(level, i_b, o_y, o_x, m_k, o_c, m_c)
        # All rows of this product are the same, and the first one is stored.
        b_p = _times(b_k * scale, b_v, TERMS, WIDEN) / scale - constant
        m_r = (tl.arange(0, b_p.shape[0]) == 0)[:, None]
        p_out = out_ptr + OFFSET + o_c[None, :] + tl.zeros([b_p.shape[0], 1], tl.int32)
        tl.store(p_out, b_p.to(out_ptr.dtype.element_ty), mask=m_r & m_c[None, :])


@triton.jit
def _largest(vector_ptr, C: tl.constexpr):
    BC: tl.constexpr = 512
    b_most = tl.zeros([BC], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_most = tl.maximum(b_most, tl.abs(tl.load(vector_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)))
    return tl.max(b_most, axis=0)


@triton.jit
def all_dots(
    levels, channels, vector_ptr, i_b, row, column, C: tl.constexpr, GEOMETRIES: tl.constexpr, WIDEN: tl.constexpr
):
    """`vector . pixel` for every pixel of the window [BJ], and the sum of the vector's elements."""
    element = levels[0].pixels.dtype.element_ty
    scale = 1.0
    if element == tl.float16 and vector_ptr.dtype.element_ty != element:
        scale = _power(_largest(vector_ptr, C), element)
    b_dot = tl.zeros([GEOMETRIES[0].padded_side * GEOMETRIES[0].padded_side], tl.float32)
    total = 0.0
    for s in tl.static_range(len(levels)):
        d, t = _dots(levels[s], channels[s], vector_ptr, scale, i_b, row, column, GEOMETRIES, s, WIDEN)
        b_dot, total = b_dot + d, total + t
    return b_dot, total


@triton.jit
def window_pixels(GEOMETRIES: tl.constexpr):
    """Where the pixels of a window stand in the statistics [BJ], and which of them there are."""
    SIDE: tl.constexpr = GEOMETRIES[0].side
    PADDED: tl.constexpr = GEOMETRIES[0].padded_side
    o_j = tl.arange(0, PADDED * PADDED)
    return o_j // PADDED * SIDE + o_j % PADDED, (o_j // PADDED < SIDE) & (o_j % PADDED < SIDE)
