"""The samples that the synchronizer reads of one level, several pictures at once. No kernel of its own is here."""

import triton
import triton.language as tl

from .sampling import place, single


@triton.jit
def read_level(
    p_picture,
    b_u,
    b_v,
    b_w,
    m_seen,
    o_d,
    stride_vs,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    D: tl.constexpr,
    TIMES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The four pixels around the samples of one level at (u, v), where 0 and 1 are the edges of the map.

    Returns their weights [BQ, BK, 1], and the pixels themselves: four tiles [BQ, BK, BD] for the first BD channels,
    then four for the next. `p_picture` [1, BK, BD] points at the first channels o_d of the first pixel of every slot's
    picture; u, v and the samples' weights b_w are [BQ, BK]. Pixels outside of the map are zero.
    """
    BD: tl.constexpr = o_d.shape[2]
    o_x, o_y, b_right, b_below, m_left, m_right, m_top, m_below = place(b_u, b_v, HEIGHT, WIDTH)
    m_top = m_top & m_seen
    m_below = m_below & m_seen
    m_00 = (m_left & m_top)[:, :, None]
    m_01 = (m_right & m_top)[:, :, None]
    m_10 = (m_left & m_below)[:, :, None]
    m_11 = (m_right & m_below)[:, :, None]
    o_pixel = START + o_y * WIDTH + o_x
    row = stride_vs * WIDTH
    if WIDE:
        o_pixel = o_pixel.to(tl.int64)
        row = stride_vs.to(tl.int64) * WIDTH
    p_tap = p_picture + (o_pixel * stride_vs)[:, :, None]
    p_next = p_tap + stride_vs
    b_taps = ()
    for c in tl.static_range(TIMES):
        m_d = c * BD + o_d < D
        b_00 = tl.load(p_tap + c * BD, mask=m_00 & m_d, other=0.0)
        b_01 = tl.load(p_next + c * BD, mask=m_01 & m_d, other=0.0)
        b_10 = tl.load(p_tap + row + c * BD, mask=m_10 & m_d, other=0.0)
        b_11 = tl.load(p_next + row + c * BD, mask=m_11 & m_d, other=0.0)
        b_taps = b_taps + (b_00, b_01, b_10, b_11)
    b_below = b_below * b_w
    b_above = b_w - b_below
    b_11 = b_below * b_right
    b_01 = b_above * b_right
    b_10 = b_below - b_11
    b_00 = b_above - b_01
    return (b_00[:, :, None], b_01[:, :, None], b_10[:, :, None], b_11[:, :, None]), b_taps


@triton.jit
def add_pixels(b_acc, b_weights, b_taps):
    """Adds weighted pixels to the tiles [BQ, BK, BD] of b_acc; the other two are what `read_level` returns."""
    b_new = ()
    for c in tl.static_range(len(b_acc)):
        b_s = b_acc[c]
        for t in tl.static_range(4):
            b_s += b_weights[t] * single(b_taps[4 * c + t])
        b_new = b_new + (b_s,)
    return b_new
