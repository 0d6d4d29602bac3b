"""A 7x7 depthwise convolution on tensor cores, as products with band matrices: what `dwconv_bands_fwd_kernel` runs.

The results of a group, 2 x 2 pixels, depend on a window of 8 x 8 pixels. For a pair of channels, one row of the windows
of 16 groups is a matrix [16, 8 columns * 2 channels]. It is multiplied by a band [8 columns * 2 channels, 2 * 2 pixels
* 2 channels], whose columns hold up to 7 weights, and zeros elsewhere; a window has eight rows and takes eight
products. 38 % of their terms are no zeros, yet 128 results take 64 cycles of a tensor core, and 196 of multiply-adds.

A program makes 16 strips of some rows and 2 columns. It loads a row of a strip's windows once for up to four groups,
and all groups share the bands. The shapes let a thread load 4 channels of a pixel, and thereby exactly what a tensor
core expects of it: nothing is widened, and nothing passes through shared memory (an ahead-of-time test checks this).
"""

import triton
import triton.language as tl


@triton.jit
def _bands(p_weight, o_kx, o_oy, m_k, keep, C: tl.constexpr, CHUNKS: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr):
    """The band matrices [pairs, 16, 8] for one row of the windows."""
    m = (m_k & (o_oy <= ROW) & (o_oy > ROW - 7))[:, None]
    b_w = tl.load(p_weight + ROW * 7 * C, mask=m, other=0.0)
    b_w = (b_w.to(tl.uint16, bitcast=True) & keep).to(b_w.dtype, bitcast=True)
    # From [column's high bit, chunk, result, column's low bits, pair, channel of the pair].
    return b_w.reshape(2, CHUNKS, 8, 4, V // 2, 2).permute(4, 1, 0, 3, 5, 2).reshape(V // 2 * CHUNKS, 16, 8)


@triton.jit
def convolve_in_bands(
    x_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr,
    V: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes a program's share of the convolution with its bias, [B, H, W, C]; arguments as the kernel has them.

    ROWS are the rows of a strip, ACROSS the strips side by side, CHUNKS and V the warps and the channels of each.
    """
    PAIRS: tl.constexpr = V // 2 * CHUNKS
    DOWN: tl.constexpr = 16 // ACROSS
    across = tl.cdiv(W, 2 * ACROSS)
    down = tl.cdiv(H, DOWN * ROWS)
    i = tl.program_id(0)
    # Programs next to one another share pixels, whose channels lie in the same lines of the caches.
    parts = tl.cdiv(C, V * CHUNKS)
    i_c = i % parts * (V * CHUNKS)
    i = i // parts
    i_x = i % across * (2 * ACROSS)
    i_y = i // across % down * (DOWN * ROWS)
    i_b = (i // across // down).to(tl.int64)

    # The first dimension of every tile in memory counts threads, then what a thread holds; the second is V channels.
    # The bits of a thread are those by which a tensor core hands out its operands. This one is for bands:
    # [column's high bit, chunk, result, column's low bits].
    o = tl.arange(0, 64 * CHUNKS)
    o_v = tl.arange(0, V)[None, :]
    o_eight = o // 4 % 8
    o_c = i_c + o // 32 % CHUNKS * V
    # A result is a row, a column and a channel of the group's pixel, a bit each.
    o_oy = o_eight // 4
    o_kx = o % 4 + o // (32 * CHUNKS) * 4 - o_eight // 2 % 2
    m_k = (o_kx >= 0) & (o_kx < 7) & (o_c < C)
    keep = tl.where((o_eight % 2)[:, None] == o_v % 2, 0xFFFF, 0).to(tl.uint16)
    p_weight = weight_ptr + ((o_kx - 7 * o_oy) * C + o_c)[:, None] + o_v
    b_bands = ()
    for t in tl.static_range(8):
        b_band = _bands(p_weight, o_kx, o_oy, m_k, keep, C, CHUNKS, V, t)
        if WIDEN:
            b_band = b_band.to(tl.float32)
        b_bands = b_bands + (b_band,)

    # Results in memory: [strip's high bit, chunk, strip's low bits, pixel of the group].
    b_bias = tl.load(bias_ptr + o_c[:, None] + o_v, mask=(o_c < C)[:, None], other=0.0).to(tl.float32)
    b_bias = b_bias.reshape(2, CHUNKS, 8, 4, V // 2, 2).permute(4, 1, 0, 2, 3, 5).reshape(PAIRS, 16, 8)
    b_z = ()
    for _ in tl.static_range(ROWS // 2):
        b_z = b_z + (b_bias,)

    # Pixels in memory: [strip's high bit, column's high bit, chunk, strip's low bits, column's low bits].
    o_in = tl.arange(0, 128 * CHUNKS)
    o_strip = o_in // (64 * CHUNKS) * 8 + o_in // 4 % 8
    o_xc = i_c + o_in // 32 % CHUNKS * V
    o_x = i_x + o_strip % ACROSS * 2 + o_in % 4 + o_in // (32 * CHUNKS) % 2 * 4 - 3
    o_y = i_y + o_strip // ACROSS * ROWS - 3
    m_x = (o_x >= 0) & (o_x < W) & (o_xc < C)
    p_x = x_ptr + i_b * stride_xb
    p_x = p_x + (o_y.to(tl.int64) * stride_xh + o_x.to(tl.int64) * stride_xw + o_xc)[:, None] + o_v
    for s in tl.static_range(ROWS + 6):
        m = m_x & (o_y >= -s) & (o_y < H - s)
        b_x = tl.load(p_x, mask=m[:, None], other=0.0)
        p_x += stride_xh
        b_x = b_x.reshape(2, 2, CHUNKS, 8, 4, V // 2, 2).permute(5, 2, 0, 3, 1, 4, 6).reshape(PAIRS, 16, 16)
        if WIDEN:
            b_x = b_x.to(tl.float32)
        b_new = ()
        for j in tl.static_range(ROWS // 2):
            if s >= 2 * j and s < 2 * j + 8:
                b_new = b_new + (tl.dot(b_x, b_bands[s - 2 * j], b_z[j], input_precision="ieee"),)
            else:
                b_new = b_new + (b_z[j],)
        b_z = b_new

    o_strip = o // (32 * CHUNKS) * 8 + o_eight
    o_x = i_x + o_strip % ACROSS * 2 + o % 2
    o_y = i_y + o_strip // ACROSS * ROWS + o // 2 % 2
    p_z = z_ptr + (((i_b * H + o_y) * W + o_x) * C + o_c)[:, None] + o_v
    for j in tl.static_range(ROWS // 2):
        b_out = b_z[j].reshape(V // 2, CHUNKS, 2, 8, 4, 2).permute(2, 1, 3, 4, 0, 5).reshape(64 * CHUNKS, V)
        m = (o_y < H - 2 * j) & (o_x < W) & (o_c < C)
        tl.store(p_z, b_out.to(z_ptr.dtype.element_ty), mask=m[:, None])
        p_z += 2 * W * C
