"""A 7x7 depthwise convolution by multiply-adds in float32: what `dwconv_norm_fwd_kernel` runs before its norm.

A program makes a few rows of a few columns with all channels, and loads a pixel once for each kx and all rows that it
adds to: 7 * (rows + 6) / rows loads per output instead of 49.
"""

import triton
import triton.language as tl

from .sampling import single


@triton.jit
def vector(p, zero, m):
    """Loads a vector over channels for every pixel of the tile [BW, BC], in the tile's own layout.

    In any other layout the vector would pass through shared memory.
    """
    return single(tl.load(p + zero, mask=m, other=0.0))


@triton.jit
def convolve_in_columns(
    p_x,
    p_weight,
    p_bias,
    i_y,
    o_x,
    o_c,
    H,
    W,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    """The convolution with its bias, as a tuple of tiles [BW, BC]: the ROWS rows of the first chunk, then the next.

    `p_x` points at the picture, `o_x` [BW] are output columns, `o_c` [1, BC] are the channels of the first chunk.
    """
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    zero = tl.zeros_like(o_x)[:, None]
    b_z = ()
    for s in tl.static_range(CHUNKS):
        b_bias = vector(p_bias + s * BC + o_c, zero, (zero == 0) & (s * BC + o_c < C))
        for _ in tl.static_range(ROWS):
            b_z = b_z + (b_bias,)
    p_x += (i_y - 3).to(tl.int64) * stride_xh + o_c
    p_weight += o_c
    for i_kx in range(7):
        o_column = o_x + (i_kx - 3)
        m_column = ((o_column >= 0) & (o_column < W))[:, None]
        p_column = p_x + o_column.to(tl.int64)[:, None] * stride_xw
        b_new = ()
        for s in tl.static_range(CHUNKS):
            m_c = s * BC + o_c < C
            b_chunk = ()
            for r in tl.static_range(ROWS):
                b_chunk = b_chunk + (b_z[s * ROWS + r],)
            b_w = ()
            p_row = p_column + s * BC
            for i in tl.static_range(ROWS + 6):
                if i < 7:
                    b_w = b_w + (vector(p_weight + ((i * 7 + i_kx) * C + s * BC), zero, (zero == 0) & m_c),)
                # Row i_y lies inside the map. Rows before it may be above the map, rows after it below.
                m_x = m_column & m_c
                if i < 3:
                    m_x = m_x & (i_y >= 3 - i)
                elif i > 3:
                    m_x = m_x & (i - 3 < H - i_y)
                b_x = single(tl.load(p_row, mask=m_x, other=0.0))
                p_row += stride_xh
                b_rows = ()
                for r in tl.static_range(ROWS):
                    b_row = b_chunk[r]
                    if r <= i and i - r < 7:
                        b_row += b_x * b_w[i - r]
                    b_rows = b_rows + (b_row,)
                b_chunk = b_rows
            b_new = b_new + b_chunk
        b_z = b_new
    return b_z
