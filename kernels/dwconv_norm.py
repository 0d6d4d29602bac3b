"""Depthwise 7x7 convolution, bias and LayerNorm over channels: y = (z - mean z) / sqrt(var z + eps) * g + h.

Here z = b + sum_t w_t * x_t, and x_t is the map [B, H, W, C] shifted by tap t = 7 * ky + kx, zero outside. Mean and
variance run over the C channels of a pixel. The map is read once (its halo comes from the caches) and written once: the
convolution's result stays in registers, is not rounded before the norm, and nothing is copied to NCHW and back. All
arithmetic is float32 from the load on. The variance is computed in a second pass, from values less their mean.

A program makes a few rows of a few columns, with all channels. It loads a pixel once for each kx and adds it to every
output row that the pixel contributes to, so an output takes 7 * (rows + 6) / rows loads instead of 49. The backward
pass recomputes through PyTorch. Maps of few pixels leave most of a GPU idle, and the PyTorch form may be faster there.
"""

import torch
import triton
import triton.language as tl

from .configs import dwconv_in_bands, dwconv_norm_tile
from .dwconv_bands import dwconv_bands_fwd


@triton.jit
def _single(b):
    """Widens to float32; a bfloat16 by shifting its bits.

    The shift is one instruction. The compiler's own conversion takes two for every other element.
    """
    if b.dtype == tl.bfloat16:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b.to(tl.float32)


@triton.jit
def _vector(p, zero, m):
    """Loads a vector over channels for every pixel of the tile [BW, BC], in the tile's own layout.

    In any other layout the vector would pass through shared memory.
    """
    return _single(tl.load(p + zero, mask=m, other=0.0))


@triton.jit
def _convolve(
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
        b_bias = _vector(p_bias + s * BC + o_c, zero, (zero == 0) & (s * BC + o_c < C))
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
                    b_w = b_w + (_vector(p_weight + ((i * 7 + i_kx) * C + s * BC), zero, (zero == 0) & m_c),)
                # Row i_y lies inside the map. Rows before it may be above the map, rows after it below.
                m_x = m_column & m_c
                if i < 3:
                    m_x = m_x & (i_y >= 3 - i)
                elif i > 3:
                    m_x = m_x & (i - 3 < H - i_y)
                b_x = _single(tl.load(p_row, mask=m_x, other=0.0))
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


@triton.jit
def dwconv_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    i = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(W, BW)
    down = tl.cdiv(H, ROWS)
    i_b = i // (across * down)
    i_y = (i // across % down * ROWS).to(tl.int32)
    o_x = (i % across * BW).to(tl.int32) + tl.arange(0, BW)

    o_c = tl.arange(0, BC)[None, :]
    b_z = _convolve(
        x_ptr + i_b * stride_xb, weight_ptr, bias_ptr, i_y, o_x, o_c, H, W, stride_xh, stride_xw, C, ROWS, BC
    )

    b_means, b_rstds = (), ()
    for r in tl.static_range(ROWS):
        b_sum = tl.zeros([BW, BC], tl.float32)
        for s in tl.static_range(CHUNKS):
            b_sum += b_z[s * ROWS + r]
        b_mean = (tl.sum(b_sum, axis=1) / C)[:, None]
        b_square = tl.zeros([BW, BC], tl.float32)
        for s in tl.static_range(CHUNKS):
            b_d = b_z[s * ROWS + r] - b_mean
            if (s + 1) * BC > C:
                b_d = tl.where(s * BC + o_c < C, b_d, 0.0)
            b_square += b_d * b_d
        b_means = b_means + (b_mean,)
        b_rstds = b_rstds + (tl.rsqrt(tl.sum(b_square, axis=1) / C + eps)[:, None],)

    zero = tl.zeros_like(o_x)[:, None]
    p_pixel = out_ptr + o_x[:, None] * C + o_c
    for s in tl.static_range(CHUNKS):
        m_s = (o_x < W)[:, None] & (s * BC + o_c < C)
        b_g = _vector(norm_weight_ptr + s * BC + o_c, zero, m_s)
        b_h = _vector(norm_bias_ptr + s * BC + o_c, zero, m_s)
        for r in tl.static_range(ROWS):
            b_y = (b_z[s * ROWS + r] - b_means[r]) * b_rstds[r] * b_g + b_h
            p_out = p_pixel + ((i_b * H + i_y + r) * W * C + s * BC)
            tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_s & (r < H - i_y))


def dwconv_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Convolves and normalises a map, in one launch or on tensor cores in two (`configs.dwconv_in_bands`).

    Args:
        x: [B, H, W, C], fp16/bf16/fp32; read in place where the channels' stride is 1, otherwise copied.
        weight: [49, C], tap 7 * ky + kx of every channel; copied if it is not contiguous.
        bias, norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        [B, H, W, C] of x's dtype, contiguous.
    """
    b, h, w, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, bias, norm_weight, norm_bias = (t.contiguous() for t in (weight, bias, norm_weight, norm_bias))
    if dwconv_in_bands(x.itemsize, channels, x.stride()[:3]):
        return dwconv_bands_fwd(x, weight, bias, norm_weight, norm_bias, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    architecture = triton.runtime.driver.active.get_current_target().arch if x.is_cuda else None
    tile = dwconv_norm_tile(architecture, channels, x.stride()[:3])
    programs = b * triton.cdiv(h, tile.rows) * triton.cdiv(w, tile.columns)
    if programs > 0:
        dwconv_norm_fwd_kernel[(programs,)](
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            out,
            h,
            w,
            *x.stride()[:3],
            eps,
            C=channels,
            ROWS=tile.rows,
            BW=tile.columns,
            BC=tile.channels,
            num_warps=tile.warps,
        )
    return out
