"""Bilinear sampling: which pixels a sample is made of, and how they are loaded. No kernel of its own is here."""

import triton
import triton.language as tl


@triton.jit
def single(b):
    """Widens to float32; a bfloat16 by shifting its bits, which is one instruction."""
    if b.dtype == tl.bfloat16:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b.to(tl.float32)


@triton.jit
def place(b_x, b_y, h, w):
    """Where samples at the locations (b_x, b_y) lie in a map of h x w pixels.

    Returns the column and the row of the pixel at their upper left, how far they are to the right of it and below it,
    and masks: whether the left column, the right column, the upper row and the lower row lie inside the map. Both
    columns of a location that is not finite, or far outside, count as outside.
    """
    b_x = b_x * w - 0.5
    b_y = b_y * h - 0.5
    # Every comparison with NaN is false. Other numbers must not reach the conversion to integers.
    m_in = (b_x >= -1.0) & (b_x < w) & (b_y >= -1.0) & (b_y < h)
    b_x = tl.where(m_in, b_x, 0.0)
    b_y = tl.where(m_in, b_y, 0.0)
    b_left = tl.floor(b_x)
    b_top = tl.floor(b_y)
    o_x = b_left.to(tl.int32)
    o_y = b_top.to(tl.int32)
    return o_x, o_y, b_x - b_left, b_y - b_top, m_in & (o_x >= 0), m_in & (o_x + 1 < w), o_y >= 0, o_y + 1 < h


@triton.jit
def load_pixel(p_value, o_pixel, m_pixel, m_d, stride_s):
    """Loads one pixel [BQ, BD] for every query, in float32; zero where the mask [BQ] says that there is none."""
    p = p_value + (o_pixel.to(tl.int64) * stride_s)[:, None]
    return single(tl.load(p, mask=m_pixel[:, None] & m_d, other=0.0))
