"""Depthwise 7x7 convolution, bias and LayerNorm over channels: y = (z - mean z) / sqrt(var z + eps) * g + h.

Here z = b + sum_t w_t * x_t, and x_t is the map [B, H, W, C] shifted by tap t = 7 * ky + kx, zero outside. Mean and
variance run over a pixel's channels, the variance from values less their mean. All sums are float32. Wide 16-bit maps
are convolved on tensor cores, a few channels at a time (`kernels/dwconv_bands.py`), and normalised in a second launch:
in place, from z rounded to bfloat16 as in PyTorch, or for float16, in which z may overflow, from a buffer in float32.
There a pixel that is not finite reaches one pixel farther, as zero times NaN is NaN. Other maps take one launch, which
widens on load and keeps z in registers (`kernels/dwconv_columns.py`). The backward pass recomputes through PyTorch,
which may also be faster on maps of few pixels. docs/kernels.md has what was tried.
"""

import torch
import triton
import triton.language as tl

from .configs import dwconv_bands_tile, dwconv_in_bands, dwconv_norm_tile, pixel_norm_tile
from .dwconv_bands import convolve_in_bands
from .dwconv_columns import convolve_in_columns, vector
from .sampling import single


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
    b_z = convolve_in_columns(
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
        b_g = vector(norm_weight_ptr + s * BC + o_c, zero, m_s)
        b_h = vector(norm_bias_ptr + s * BC + o_c, zero, m_s)
        for r in tl.static_range(ROWS):
            b_y = (b_z[s * ROWS + r] - b_means[r]) * b_rstds[r] * b_g + b_h
            p_out = p_pixel + ((i_b * H + i_y + r) * W * C + s * BC)
            tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_s & (r < H - i_y))


@triton.jit
def dwconv_bands_fwd_kernel(
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
    convolve_in_bands(
        x_ptr, weight_ptr, bias_ptr, z_ptr, H, W, stride_xb, stride_xh, stride_xw, C, ROWS, ACROSS, CHUNKS, V, WIDEN
    )


@triton.jit(do_not_specialize=["pixels"])
def pixel_norm_fwd_kernel(
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
    i = tl.program_id(0).to(tl.int64) * BP
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)[None, :]
    m_p = (o_p < pixels - i)[:, None]
    o_z = i * C + (o_p[:, None] * C + o_c)
    b_z = ()
    b_sum = tl.zeros([BP, BC], tl.float32)
    for s in tl.static_range(CHUNKS):
        b_chunk = single(tl.load(z_ptr + o_z + s * BC, mask=m_p & (s * BC + o_c < C), other=0.0))
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
    zero = tl.zeros_like(o_p)[:, None]
    for s in tl.static_range(CHUNKS):
        m = m_p & (s * BC + o_c < C)
        b_g = vector(norm_weight_ptr + s * BC + o_c, zero, m)
        b_h = vector(norm_bias_ptr + s * BC + o_c, zero, m)
        b_y = (b_z[s] - b_mean) * b_rstd * b_g + b_h
        tl.store(out_ptr + o_z + s * BC, b_y.to(out_ptr.dtype.element_ty), mask=m)


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
        return _in_bands(x, weight, bias, norm_weight, norm_bias, eps)
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


def _in_bands(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`dwconv_norm_fwd` of a map that `configs.dwconv_in_bands` accepts, with contiguous parameters."""
    b, h, w, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device) if x.dtype == torch.float16 else out
    architecture = triton.runtime.driver.active.get_current_target().arch if x.is_cuda else None
    tile, norm = dwconv_bands_tile(architecture, channels), pixel_norm_tile(architecture, channels)
    across = tile.columns // 2
    parts = triton.cdiv(channels, tile.channels * tile.warps)
    programs = b * triton.cdiv(h, 16 // across * tile.rows) * triton.cdiv(w, tile.columns) * parts
    if programs > 0:
        dwconv_bands_fwd_kernel[(programs,)](
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
        pixel_norm_fwd_kernel[(triton.cdiv(b * h * w, norm.pixels),)](
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
