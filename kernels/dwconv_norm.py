"""7x7 depthwise convolution, bias, LayerNorm over channels: y = (z - mean z) / sqrt(var z + eps) * g + h, z = b + sum_t w_t * x_t.

x_t is the map [B, H, W, C] shifted by tap t = 7 * ky + kx, zero outside; mean and variance are those of a pixel's C channels. The map is
read once, its halo from the caches, and written once: the convolution's result stays in registers, is not rounded before the norm, and
nothing is copied to NCHW and back. All float32 from the load on; the variance is that of what the mean has been taken off.

A program makes a few rows of a few columns, all channels, a chunk of them after the other. A pixel is loaded once for each kx and goes
into every output row it is under: 7 * (rows + 6) / rows loads an output in place of 49. The backward pass recomputes through PyTorch.
Maps of few pixels leave most of a GPU idle: there the PyTorch form may be faster.
"""

import torch
import triton
import triton.language as tl

from .configs import dwconv_norm_tile


@triton.jit
def _vector(p, zero, m):
    """A vector over channels for every pixel of the tile [BW, BC]: in the tile's own layout, or it would go by way of shared memory."""
    return tl.load(p + zero, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _convolve(p_x, p_weight, p_bias, i_y, o_x, m_c, H, W, stride_xh, stride_xw, C: tl.constexpr, ROWS: tl.constexpr):
    """A chunk of channels of the convolution with its bias: a tuple of ROWS rows [BW, BC].

    `p_x` points at the chunk's channels [1, BC] of the picture, `p_weight` and `p_bias` at theirs; `i_y` and `o_x` [BW] are output pixels.
    """
    zero = tl.zeros_like(o_x)[:, None]
    m_v = (zero == 0) & m_c
    b_bias = _vector(p_bias, zero, m_v)
    b_z = ()
    for _ in tl.static_range(ROWS):
        b_z = b_z + (b_bias,)
    for i_kx in range(7):
        o_column = o_x + (i_kx - 3)
        m_x = ((o_column >= 0) & (o_column < W))[:, None] & m_c
        p_column = p_x + o_column.to(tl.int64)[:, None] * stride_xw
        b_w = ()
        for i in tl.static_range(ROWS + 6):
            if i < 7:
                b_w = b_w + (_vector(p_weight + (i * 7 + i_kx) * C, zero, m_v),)
            i_row = i_y + (i - 3)
            b_x = tl.load(p_column + i_row.to(tl.int64) * stride_xh, mask=m_x & (i_row >= 0) & (i_row < H), other=0.0).to(tl.float32)
            b_new = ()
            for r in tl.static_range(ROWS):
                b_row = b_z[r]
                if r <= i and i - r < 7:
                    b_row += b_x * b_w[i - r]
                b_new = b_new + (b_row,)
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
    b_z = ()
    for s in tl.static_range(CHUNKS):
        o_s = s * BC + o_c
        p_x = x_ptr + i_b * stride_xb + o_s
        b_z = b_z + (_convolve(p_x, weight_ptr + o_s, bias_ptr + o_s, i_y, o_x, o_s < C, H, W, stride_xh, stride_xw, C, ROWS),)

    zero = tl.zeros_like(o_x)[:, None]
    for r in tl.static_range(ROWS):
        b_sum = tl.zeros([BW, BC], tl.float32)
        for s in tl.static_range(CHUNKS):
            b_sum += b_z[s][r]
        b_mean = (tl.sum(b_sum, axis=1) / C)[:, None]
        b_square = tl.zeros([BW, BC], tl.float32)
        for s in tl.static_range(CHUNKS):
            b_d = b_z[s][r] - b_mean
            if (s + 1) * BC > C:
                b_d = tl.where(s * BC + o_c < C, b_d, 0.0)
            b_square += b_d * b_d
        b_rstd = tl.rsqrt(tl.sum(b_square, axis=1) / C + eps)[:, None]
        p_out = out_ptr + ((i_b * H + i_y + r) * W + o_x)[:, None] * C
        m_out = ((o_x < W) & (i_y + r < H))[:, None]
        for s in tl.static_range(CHUNKS):
            o_s = s * BC + o_c
            m_s = (zero == 0) & (o_s < C)
            b_g = _vector(norm_weight_ptr + o_s, zero, m_s)
            b_h = _vector(norm_bias_ptr + o_s, zero, m_s)
            b_y = (b_z[s][r] - b_mean) * b_rstd * b_g + b_h
            tl.store(p_out + o_s, b_y.to(out_ptr.dtype.element_ty), mask=m_out & m_s)


def dwconv_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Convolves and normalises a map, in one launch.

    Args:
        x: [B, H, W, C], fp16/bf16/fp32; read in place where the channels' stride is 1, else copied.
        weight: [49, C], tap 7 * ky + kx of every channel; copied where not contiguous.
        bias, norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        [B, H, W, C] of x's dtype, contiguous.
    """
    b, h, w, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, bias, norm_weight, norm_bias = (t.contiguous() for t in (weight, bias, norm_weight, norm_bias))
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
