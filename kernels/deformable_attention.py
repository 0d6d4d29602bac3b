"""Multi-scale deformable attention: out = sum over levels and points of weight * bilinear sample of the level's map.

A sample at (x, y) lies at the pixel coordinates (x * w - 0.5, y * h - 0.5). It reads the four pixels around it; pixels
outside of the map are zero. Levels lie in value [B, S, H, D] one after the other. A program makes the results of some
queries for one head: locations and weights are read once for each query, and pixels as vectors over the head's
channels. No tensor of the size of the samples exists. All arithmetic is float32 from the load on.

The backward pass reads the pixels again. The gradient of value is added up by atomics, in float32 and in any order;
or, for equal bits in every run, from a sorted list of all pixels that were read. Few queries of few heads leave most of
a GPU idle, and PyTorch may be as fast there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configs import SamplingTile, deformable_attention_tile


@triton.jit
def _single(b):
    """Widens to float32; a bfloat16 by shifting its bits, which is one instruction."""
    if b.dtype == tl.bfloat16:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b.to(tl.float32)


@triton.jit
def _place(b_x, b_y, h, w):
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
def _pixel(p_value, o_pixel, m_pixel, m_d, stride_s):
    """Loads one pixel [BQ, BD] for every query, in float32; zero where the mask [BQ] says that there is none."""
    p = p_value + (o_pixel.to(tl.int64) * stride_s)[:, None]
    return _single(tl.load(p, mask=m_pixel[:, None] & m_d, other=0.0))


@triton.jit
def _program(Q, H, BQ: tl.constexpr):
    """This program's picture, head and queries [BQ]; heads vary fastest, because they lie side by side in memory."""
    i = tl.program_id(0)
    tiles = tl.cdiv(Q, BQ)
    i_b = i // (H * tiles)
    o_q = (i // H % tiles) * BQ + tl.arange(0, BQ)
    return i_b.to(tl.int64), (i % H).to(tl.int64), o_q


@triton.jit(do_not_specialize=["sides", "Q", "H"])
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
    i_b, i_h, o_q = _program(Q, H, BQ)
    m_q = o_q < Q
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    o_row = (i_b * Q + o_q) * H + i_h
    p_value = value_ptr + i_b * stride_b + i_h * stride_h + o_d
    p_locations = locations_ptr + o_row * (L * P * 2)
    p_weights = weights_ptr + o_row * (L * P)
    b_out = tl.zeros([BQ, BD], tl.float32)
    start = 0
    for s in tl.static_range(L):
        h = sides[2 * s]
        w = sides[2 * s + 1]
        for i_p in tl.range(0, P, loop_unroll_factor=UNROLL):
            b_x = tl.load(p_locations + (s * P + i_p) * 2, mask=m_q, other=0.0).to(tl.float32)
            b_y = tl.load(p_locations + (s * P + i_p) * 2 + 1, mask=m_q, other=0.0).to(tl.float32)
            b_a = tl.load(p_weights + s * P + i_p, mask=m_q, other=0.0).to(tl.float32)
            o_x, o_y, b_right, b_low, m_left, m_right, m_top, m_low = _place(b_x, b_y, h, w)
            o_pixel = start + o_y * w + o_x
            m_top = m_top & m_q
            m_low = m_low & m_q
            b_top = b_a * (1.0 - b_low)
            b_low = b_a * b_low
            b_left = 1.0 - b_right
            b_out += (b_top * b_left)[:, None] * _pixel(p_value, o_pixel, m_top & m_left, m_d, stride_s)
            b_out += (b_top * b_right)[:, None] * _pixel(p_value, o_pixel + 1, m_top & m_right, m_d, stride_s)
            b_out += (b_low * b_left)[:, None] * _pixel(p_value, o_pixel + w, m_low & m_left, m_d, stride_s)
            b_out += (b_low * b_right)[:, None] * _pixel(p_value, o_pixel + w + 1, m_low & m_right, m_d, stride_s)
        start += h * w
    p_out = out_ptr + (o_row * D)[:, None] + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q[:, None] & m_d)


def _tile(value: torch.Tensor, stage: str) -> tuple[SamplingTile, int, int]:
    """The tile of a launch, the queries of a program, and the channels rounded up to a power of two."""
    architecture = triton.runtime.driver.active.get_current_target().arch if value.is_cuda else None
    tile = deformable_attention_tile(architecture, stage, value.element_size(), value.shape[-1], value.stride()[:3])
    channels = max(16, triton.next_power_of_2(value.shape[-1]))
    return tile, max(1, tile.elements // channels), channels


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
    tile, at_once, block = _tile(value, "forward")
    programs = batch * heads * triton.cdiv(queries, at_once)
    if out.numel() > 0:
        deformable_attention_fwd_kernel[(programs,)](
            value,
            locations,
            weights,
            out,
            tuple(sides),
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
