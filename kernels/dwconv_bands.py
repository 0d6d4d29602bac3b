"""The 7x7 depthwise convolution with its bias on tensor cores, and the LayerNorm after it as a kernel of its own.

The formula is that of `kernels/dwconv_norm.py`. Its kernel spends most instructions on multiplying and on widening
16-bit numbers one by one. Here a matrix product does both. The results of a group, 2 x 2 pixels, depend on a window of
8 x 8 pixels. For a pair of channels, a row of windows of 16 groups is a matrix [16, 8 columns * 2 channels], which is
multiplied by a band matrix of weights [8 columns * 2 channels, 2 * 2 pixels * 2 channels]. Each of its columns holds up
to 7 weights, and zeros elsewhere; the eight rows of a window take eight such products. Of their terms 38 % are no
zeros, but a tensor core takes 64 cycles for 128 results, where multiply-adds alone take 196.

A program makes 16 strips of some rows and 2 columns. A row of a strip's windows is loaded once and used by up to four
groups, and the bands serve all of them. All shapes are chosen such that a thread loads 4 channels of a pixel, and has
thereby what the tensor core expects of it: nothing passes through shared memory (tests/ops/dwconv_norm compiles this).

A program has few channels, so the norm runs afterwards, in place: sums are rounded to bfloat16 between the two, as in
PyTorch. In float16 they could overflow, and pass through a buffer in float32. Sums are float32. Because zero times NaN
is NaN, a pixel that is not finite also reaches the pixels of the groups that it touches, at most one pixel farther.
"""

import torch
import triton
import triton.language as tl

from .configs import dwconv_bands_tile, pixel_norm_tile


@triton.jit
def _bands(p_weight, o_kx, o_oy, m_k, keep, C: tl.constexpr, CHUNKS: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr):
    """The band matrices [pairs, 16, 8] for one row of the windows."""
    m = (m_k & (o_oy <= ROW) & (o_oy > ROW - 7))[:, None]
    b_w = tl.load(p_weight + ROW * 7 * C, mask=m, other=0.0)
    b_w = (b_w.to(tl.uint16, bitcast=True) & keep).to(b_w.dtype, bitcast=True)
    # From [column's high bit, chunk, result, column's low bits, pair, channel of the pair].
    return b_w.reshape(2, CHUNKS, 8, 4, V // 2, 2).permute(4, 1, 0, 3, 5, 2).reshape(V // 2 * CHUNKS, 16, 8)


@triton.jit
def dwconv_bands_kernel(
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


@triton.jit
def pixel_norm_kernel(
    z_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    pixels,
    eps,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_c = tl.arange(0, BC)[None, :]
    m_p = (o_p < pixels)[:, None]
    o_z = o_p.to(tl.int64)[:, None] * C + o_c
    b_z = ()
    b_sum = tl.zeros([BP, BC], tl.float32)
    for s in tl.static_range(CHUNKS):
        b_chunk = tl.load(z_ptr + o_z + s * BC, mask=m_p & (s * BC + o_c < C), other=0.0).to(tl.float32)
        b_z = b_z + (b_chunk,)
        b_sum += b_chunk
    b_mean = (tl.sum(b_sum, axis=1) / C)[:, None]
    b_square = tl.zeros([BP, BC], tl.float32)
    for s in tl.static_range(CHUNKS):
        b_d = b_z[s] - b_mean
        if (s + 1) * BC > C:
            b_d = tl.where(s * BC + o_c < C, b_d, 0.0)
        b_square += b_d * b_d
    b_rstd = tl.rsqrt(tl.sum(b_square, axis=1) / C + eps)[:, None]
    # The vectors are loaded for every pixel, in the tile's own layout. In any other they would pass through shared
    # memory.
    zero = tl.zeros_like(o_p)[:, None]
    for s in tl.static_range(CHUNKS):
        m = m_p & (s * BC + o_c < C)
        b_g = tl.load(norm_weight_ptr + s * BC + o_c + zero, mask=m, other=0.0).to(tl.float32)
        b_h = tl.load(norm_bias_ptr + s * BC + o_c + zero, mask=m, other=0.0).to(tl.float32)
        b_y = (b_z[s] - b_mean) * b_rstd * b_g + b_h
        tl.store(out_ptr + o_z + s * BC, b_y.to(out_ptr.dtype.element_ty), mask=m)


def dwconv_bands_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Convolves and normalises a map in two launches.

    Args:
        x: [B, H, W, C], fp16/bf16, with unit stride between channels, and as `configs.dwconv_in_bands` wants it.
        weight: [49, C], contiguous; tap 7 * ky + kx of every channel.
        bias, norm_weight, norm_bias: [C], contiguous.
        eps: added to the variance.

    Returns:
        [B, H, W, C] of x's dtype, contiguous. For float16 there is a workspace of as many numbers in float32.
    """
    b, h, w, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device) if x.dtype == torch.float16 else out
    architecture = triton.runtime.driver.active.get_current_target().arch if x.is_cuda else None
    tile, norm = dwconv_bands_tile(architecture, channels), pixel_norm_tile(architecture, channels)
    across = tile.columns // 2
    parts = triton.cdiv(channels, tile.channels * tile.warps)
    programs = b * triton.cdiv(h, 16 // across * tile.rows) * triton.cdiv(w, tile.columns) * parts
    if programs > 0:
        dwconv_bands_kernel[(programs,)](
            x,
            weight,
            bias,
            z,
            h,
            w,
            *x.stride()[:3],
            C=channels,
            ROWS=tile.rows,
            ACROSS=across,
            CHUNKS=tile.warps,
            V=tile.channels,
            # The interpreter cannot multiply matrices in bfloat16.
            WIDEN=triton.knobs.runtime.interpret,
            num_warps=tile.warps,
        )
        pixel_norm_kernel[(triton.cdiv(b * h * w, norm.pixels),)](
            z,
            norm_weight,
            norm_bias,
            out,
            b * h * w,
            eps,
            C=channels,
            BP=norm.pixels,
            BC=norm.channels,
            num_warps=norm.warps,
        )
    return out
