"""Multi-scale deformable attention: out = sum over levels and points of weight * bilinear sample of the level's map.

A sample at (x, y) lies at the pixel coordinates (x * w - 0.5, y * h - 0.5). It reads the four pixels around it; pixels
outside of the map are zero. Levels lie in value [B, S, H, D] one after the other. A program makes the results of some
queries for one head: locations and weights are read once for each query, and pixels as vectors over the head's
channels. No tensor of the size of the samples exists. All arithmetic is float32 from the load on.

The backward pass is in `deformable_attention_backward.py`. Few queries of few heads leave most of a GPU idle, and
PyTorch may be as fast there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .deformable_samples import floats, launch_tile, program, sample
from .sampling import load_pixel


@triton.jit(do_not_specialize=["Q", "H"])
def deformable_attention_fwd_kernel(
    value_ptr,
    locations_ptr,
    weights_ptr,
    out_ptr,
    sides,
    Q,
    H,
    stride_b,
    stride_s,
    stride_h,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    i_b, i_h, o_row, m_q = program(Q, H, BQ)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    p_value = value_ptr + i_b * stride_b + i_h * stride_h + o_d
    p_locations = locations_ptr + o_row * (L * P * 2)
    p_weights = weights_ptr + o_row * (L * P)
    b_out = tl.zeros([BQ, BD], tl.float32)
    start = 0
    for s in tl.static_range(L):
        h = tl.cast(sides[2 * s], tl.int32)
        w = tl.cast(sides[2 * s + 1], tl.int32)
        for i_p in tl.range(0, P, loop_unroll_factor=UNROLL):
            b_a, o_pixel, b_right, b_low, m_left, m_right, m_top, m_low = sample(
                p_locations + (s * P + i_p) * 2, p_weights + s * P + i_p, m_q, start, h, w
            )
            b_top = b_a * (1.0 - b_low)
            b_low = b_a * b_low
            b_left = 1.0 - b_right
            b_out += (b_top * b_left)[:, None] * load_pixel(p_value, o_pixel, m_top & m_left, m_d, stride_s)
            b_out += (b_top * b_right)[:, None] * load_pixel(p_value, o_pixel + 1, m_top & m_right, m_d, stride_s)
            b_out += (b_low * b_left)[:, None] * load_pixel(p_value, o_pixel + w, m_low & m_left, m_d, stride_s)
            b_out += (b_low * b_right)[:, None] * load_pixel(p_value, o_pixel + w + 1, m_low & m_right, m_d, stride_s)
        start += h * w
    p_out = out_ptr + (o_row * D)[:, None] + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q[:, None] & m_d)


def deformable_attention_fwd(
    value: torch.Tensor, sides: Sequence[int], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Samples all levels and adds the samples up, in one launch.

    Args:
        value: [B, S, H, D], fp16/bf16/fp32; read in place where the channels' stride is 1, otherwise copied.
        sides: h and w of every level, one after the other.
        locations: [B, Q, H, L, P, 2], floating point; copied if they are not contiguous.
        weights: [B, Q, H, L, P], floating point; copied if they are not contiguous.

    Returns:
        [B, Q, H * D] of value's dtype.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    channels = value.shape[-1]
    value = value if value.stride(-1) == 1 else value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    out = value.new_empty(batch, queries, heads * channels)
    tile, at_once, block = launch_tile(value, "forward")
    programs = batch * heads * triton.cdiv(queries, at_once)
    if out.numel() > 0:
        deformable_attention_fwd_kernel[(programs,)](
            value,
            locations,
            weights,
            out,
            floats(sides),
            queries,
            heads,
            *value.stride()[:3],
            L=levels,
            P=points,
            D=channels,
            BQ=at_once,
            BD=block,
            UNROLL=max(1, min(points, tile.unroll)),
            num_warps=tile.warps,
        )
    return out
