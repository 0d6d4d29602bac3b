"""The gradients of multi-scale deformable attention, for which the pixels are read again.

The gradient of value is added up by atomics, in float32 and in any order; or, for equal bits in every run, from a
sorted list of all pixels that were read. Layouts and dtypes are those of `deformable_attention.py`; all arithmetic is
float32 from the load on.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .deformable_samples import floats, launch_tile, program, sample
from .sampling import load_pixel, single


@triton.jit(do_not_specialize=["Q", "H", "S"])
def deformable_attention_bwd_kernel(
    grad_ptr,
    value_ptr,
    locations_ptr,
    weights_ptr,
    grad_value_ptr,
    grad_locations_ptr,
    grad_weights_ptr,
    sides,
    Q,
    H,
    S,
    stride_b,
    stride_s,
    stride_h,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
):
    """Adds to the gradient of value, which is float32, and stores the other two; a pointer that is None is skipped."""
    i_b, i_h, o_row, m_q = program(Q, H, BQ)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_grad = single(tl.load(grad_ptr + (o_row * D)[:, None] + o_d, mask=m_q[:, None] & m_d, other=0.0))
    p_value = value_ptr + i_b * stride_b + i_h * stride_h + o_d
    o_sample = o_row * (L * P)
    start = 0
    for s in tl.static_range(L):
        h = tl.cast(sides[2 * s], tl.int32)
        w = tl.cast(sides[2 * s + 1], tl.int32)
        for i_p in range(P):
            o_n = o_sample + s * P + i_p
            b_a, o_pixel, b_right, b_low, m_left, m_right, m_top, m_low = sample(
                locations_ptr + o_n * 2, weights_ptr + o_n, m_q, start, h, w
            )
            b_top = 1.0 - b_low
            b_left = 1.0 - b_right
            if grad_locations_ptr is not None or grad_weights_ptr is not None:
                # The products of the gradient with the four pixels, [BQ] each.
                b_0 = tl.sum(b_grad * load_pixel(p_value, o_pixel, m_top & m_left, m_d, stride_s), axis=1)
                b_1 = tl.sum(b_grad * load_pixel(p_value, o_pixel + 1, m_top & m_right, m_d, stride_s), axis=1)
                b_2 = tl.sum(b_grad * load_pixel(p_value, o_pixel + w, m_low & m_left, m_d, stride_s), axis=1)
                b_3 = tl.sum(b_grad * load_pixel(p_value, o_pixel + w + 1, m_low & m_right, m_d, stride_s), axis=1)
                b_upper = b_left * b_0 + b_right * b_1
                b_lower = b_left * b_2 + b_right * b_3
                if grad_weights_ptr is not None:
                    b_da = b_top * b_upper + b_low * b_lower
                    tl.store(grad_weights_ptr + o_n, b_da.to(grad_weights_ptr.dtype.element_ty), mask=m_q)
                if grad_locations_ptr is not None:
                    # A location without a pixel has no gradient, even where the weight or the gradient is NaN.
                    m_in = (m_left | m_right) & (m_top | m_low)
                    b_dx = tl.where(m_in, b_a * w * (b_top * (b_1 - b_0) + b_low * (b_3 - b_2)), 0.0)
                    b_dy = tl.where(m_in, b_a * h * (b_lower - b_upper), 0.0)
                    dtype = grad_locations_ptr.dtype.element_ty
                    tl.store(grad_locations_ptr + o_n * 2, b_dx.to(dtype), mask=m_q)
                    tl.store(grad_locations_ptr + o_n * 2 + 1, b_dy.to(dtype), mask=m_q)
            if grad_value_ptr is not None:
                p_grad = grad_value_ptr + (i_b * S * H + i_h) * D + o_d
                b_top *= b_a
                b_low *= b_a
                _add(p_grad, o_pixel, m_top & m_left, m_d, H * D, b_top * b_left, b_grad)
                _add(p_grad, o_pixel + 1, m_top & m_right, m_d, H * D, b_top * b_right, b_grad)
                _add(p_grad, o_pixel + w, m_low & m_left, m_d, H * D, b_low * b_left, b_grad)
                _add(p_grad, o_pixel + w + 1, m_low & m_right, m_d, H * D, b_low * b_right, b_grad)
        start += h * w


@triton.jit
def _add(p_grad, o_pixel, m_pixel, m_d, stride_s, b_c, b_grad):
    """Adds the gradient [BQ, BD] times a coefficient for every query [BQ] to one pixel for every query."""
    p = p_grad + (o_pixel.to(tl.int64) * stride_s)[:, None]
    tl.atomic_add(p, b_c[:, None] * b_grad, mask=m_pixel[:, None] & m_d, sem="relaxed")


@triton.jit(do_not_specialize=["H", "S"])
def sum_rows_bwd_kernel(
    grad_ptr,
    locations_ptr,
    weights_ptr,
    order_ptr,
    ends_ptr,
    grad_value_ptr,
    sides,
    H,
    S,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Adds up what one row of the gradient of value gets, in the order of the list."""
    i_row = tl.program_id(0).to(tl.int64)
    i_pixel = (i_row // H % S).to(tl.int32)
    # The sizes and the first pixel of the level that the pixel lies in.
    h = tl.cast(sides[0], tl.int32)
    w = tl.cast(sides[1], tl.int32)
    start = 0
    end = h * w
    for s in tl.static_range(1, L):
        m_level = i_pixel >= end
        h_s = tl.cast(sides[2 * s], tl.int32)
        w_s = tl.cast(sides[2 * s + 1], tl.int32)
        h = tl.where(m_level, h_s, h)
        w = tl.where(m_level, w_s, w)
        start = tl.where(m_level, end, start)
        end += h_s * w_s
    row = (i_pixel - start) // w
    column = (i_pixel - start) % w
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    m_row = i_row < tl.num_programs(0)
    i_n = tl.load(ends_ptr + i_row, mask=m_row, other=0)
    last = tl.load(ends_ptr + i_row + 1, mask=m_row, other=0)
    b_sum = tl.zeros([BN, BD], tl.float32)
    while i_n < last:
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < last
        o_sample = tl.load(order_ptr + o_n, mask=m_n, other=0) // 4
        b_x = tl.load(locations_ptr + o_sample * 2, mask=m_n, other=0.0).to(tl.float32)
        b_y = tl.load(locations_ptr + o_sample * 2 + 1, mask=m_n, other=0.0).to(tl.float32)
        b_c = tl.load(weights_ptr + o_sample, mask=m_n, other=0.0).to(tl.float32)
        # The coefficient follows from the distance to the pixel that the list names. If this kernel rounded the
        # location itself, the result could be a neighbour of that pixel.
        b_c *= 1.0 - tl.minimum(tl.abs(b_x * w - 0.5 - column), 1.0)
        b_c *= 1.0 - tl.minimum(tl.abs(b_y * h - 0.5 - row), 1.0)
        p_grad = grad_ptr + (o_sample // (L * P) * D)[:, None] + o_d
        b_sum += b_c[:, None] * single(tl.load(p_grad, mask=m_n[:, None] & m_d, other=0.0))
        i_n += BN
    o_c = tl.arange(0, BD)
    p_out = grad_value_ptr + i_row * D + o_c
    tl.store(p_out, tl.sum(b_sum, axis=0).to(grad_value_ptr.dtype.element_ty), mask=o_c < D)


def deformable_attention_bwd(
    grad: torch.Tensor,
    value: torch.Tensor,
    sides: Sequence[int],
    locations: torch.Tensor,
    weights: torch.Tensor,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients in one launch, from the gradient [B, Q, H * D] of the result.

    Args:
        wanted: which of the gradients of value, locations and weights are computed; the other arguments are those of
            `deformable_attention_fwd`.

    Returns:
        The wanted gradients, contiguous: of value in float32, of locations and weights in their own dtypes.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    value = value if value.stride(-1) == 1 else value.contiguous()
    grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
    gradients = [
        value.new_zeros(value.shape, dtype=torch.float32) if wanted[0] else None,
        locations.new_empty(locations.shape) if wanted[1] else None,
        weights.new_empty(weights.shape) if wanted[2] else None,
    ]
    tile, at_once, block = launch_tile(value, "backward")
    programs = batch * heads * triton.cdiv(queries, at_once)
    if weights.numel() > 0 and any(wanted):
        deformable_attention_bwd_kernel[(programs,)](
            grad,
            value,
            locations,
            weights,
            *gradients,
            floats(sides),
            queries,
            heads,
            value.shape[1],
            *value.stride()[:3],
            L=levels,
            P=points,
            D=value.shape[-1],
            BQ=at_once,
            BD=block,
            num_warps=tile.warps,
        )
    return [gradient for gradient in gradients if gradient is not None]


# Elements of a program that adds up one row, in one warp.
ROW_ELEMENTS = 256


def sum_rows_bwd(
    grad: torch.Tensor,
    sides: Sequence[int],
    locations: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of value without atomics, in one launch: every row adds up its pixels in the order of a list.

    Args:
        grad: [B, Q, H * D], the gradient of the result; the arguments that are not named here are those of
            `deformable_attention_fwd`.
        order: [B * Q * H * L * P * 4], int64: the numbers 4 * n to 4 * n + 3 stand for the four pixels that sample n
            reads. They are sorted by the row (picture * S + pixel) * H + head of value [B * S * H, D] that the pixel
            lies in, and those outside of the map come last.
        ends: [B * S * H + 1], int64: where the rows begin in `order`, and where the last one ends.
        dtype: of the result.

    Returns:
        [B, S, H, D].
    """
    batch, _, heads, levels, points, _ = locations.shape
    channels, pixels = grad.shape[-1] // heads, sum(h * w for h, w in zip(sides[::2], sides[1::2]))
    grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
    out = grad.new_empty(batch, pixels, heads, channels, dtype=dtype)
    block = max(16, triton.next_power_of_2(channels))
    if out.numel() > 0:
        sum_rows_bwd_kernel[(batch * pixels * heads,)](
            grad,
            locations,
            weights,
            order,
            ends,
            out,
            floats(sides),
            heads,
            pixels,
            L=levels,
            P=points,
            D=channels,
            BN=max(1, ROW_ELEMENTS // block),
            BD=block,
            num_warps=1,
        )
    return out
