"""The synchronizer's core: y = (ignore + sum_k exp(a_k) s_k) / (1 + sum_k exp(a_k)) over pictures, levels and points.

z = queries + table[r_j] holds the offsets o and the logits a of picture j, and s_k is the bilinear sample of a level at
reference + o / base. Pictures with r_j = 0 are skipped. A program makes a few channels of one head for a few queries.
Its tile is [queries, pictures x points, channels]: one query takes many pictures at once, so that few loads wait for
each other; many queries take one picture after the other. Every slot of the tile keeps a running maximum of its own,
which begins at 0, the logit of the added one. So logits are read once, and slots wait for each other only at the end.
Levels share offsets and have constant sizes. Nothing of the size queries x pictures x levels x points reaches memory.
Values [B, n, S, H, D] and queries are fp16/bf16/fp32, all arithmetic is float32 from the load on. Few queries leave
most of a GPU idle, even with the smaller tiles that they get; PyTorch in a CUDA graph may be as fast there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configs import feature_sync_tile
from .picture_samples import add_pixels, read_level
from .sampling import single


@triton.jit
def feature_sync_fwd_kernel(
    values_ptr,
    queries_ptr,
    table_ptr,
    index_ptr,
    reference_ptr,
    ignore_ptr,
    out_ptr,
    Q,
    N,
    R,
    stride_vb,
    stride_vn,
    stride_vs,
    stride_vh,
    stride_qb,
    stride_qq,
    stride_ib,
    stride_iq,
    stride_in,
    stride_rb,
    stride_rq,
    stride_rc,
    HEIGHTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    BASE: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUNDS: tl.constexpr,
    BQ: tl.constexpr,
    BJ: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    TIMES: tl.constexpr,
):
    L: tl.constexpr = len(HEIGHTS)
    LOGITS: tl.constexpr = H * P * 2
    W: tl.constexpr = H * P * (2 + L)
    PARTS: tl.constexpr = (P + BP - 1) // BP
    CHUNKS: tl.constexpr = (D + BD * TIMES - 1) // (BD * TIMES)
    i = tl.program_id(0)
    i_d = i % CHUNKS * (BD * TIMES)
    i_h = i // CHUNKS % H
    i_tile = i // (CHUNKS * H)
    tiles = tl.cdiv(Q, BQ)
    i_b = (i_tile // tiles).to(tl.int64)
    o_q = (i_tile % tiles * BQ + tl.arange(0, BQ)[:, None]).to(tl.int64)  # [BQ, 1]
    m_q = o_q < Q
    # [1, BK]: some points of the first picture, then the same points of the next.
    o_k = tl.arange(0, BJ * BP)[None, :]
    o_d = i_d + tl.arange(0, BD)[None, None, :]

    p_reference = reference_ptr + i_b * stride_rb + o_q * stride_rq
    b_reference_x = tl.load(p_reference, mask=m_q, other=0.0).to(tl.float32)
    b_reference_y = tl.load(p_reference + stride_rc, mask=m_q, other=0.0).to(tl.float32)
    p_query = queries_ptr + i_b * stride_qb + o_q * stride_qq
    p_index = index_ptr + i_b * stride_ib + o_q * stride_iq
    p_values = values_ptr + i_b * stride_vb + i_h.to(tl.int64) * stride_vh + o_d  # [1, 1, BD]

    b_max = tl.zeros([BQ, BJ * BP], tl.float32)
    b_sum = tl.zeros([BQ, BJ * BP], tl.float32)
    b_acc = ()
    for _ in tl.static_range(TIMES):
        b_acc = b_acc + (tl.zeros([BQ, BJ * BP, BD], tl.float32),)
    for i_round in range(0, ROUNDS * PARTS):
        o_j = (i_round // PARTS * BJ + o_k // BP).to(tl.int64)
        o_p = i_round % PARTS * BP + o_k % BP
        o_r = tl.load(p_index + o_j * stride_in, mask=m_q & (o_j < N), other=0).to(tl.int64)
        # No picture that all queries of the tile leave out costs a load.
        if tl.max(tl.max((o_r != 0).to(tl.int32), axis=1), axis=0) > 0:
            # An index that the table does not have reads nothing, and its query becomes NaN.
            m_picture = (o_r > 0) & (o_r < R)
            b_unseen = tl.where(o_r == 0, float("-inf"), float("nan"))
            p_row = table_ptr + o_r * W
            p_picture = p_values + (o_j * stride_vn)[:, :, None]
            m_seen = m_picture & (o_p < P)
            o_offset = (i_h * P + o_p) * 2
            b_u = single(tl.load(p_query + o_offset, mask=m_seen, other=0.0))
            b_v = single(tl.load(p_query + o_offset + 1, mask=m_seen, other=0.0))
            b_u += single(tl.load(p_row + o_offset, mask=m_seen, other=0.0))
            b_v += single(tl.load(p_row + o_offset + 1, mask=m_seen, other=0.0))
            b_u = b_reference_x + b_u / BASE
            b_v = b_reference_y + b_v / BASE
            b_logits = ()
            b_new = b_max
            for s in tl.static_range(L):
                o_logit = LOGITS + (i_h * L + s) * P + o_p
                b_a = single(tl.load(p_query + o_logit, mask=m_seen, other=0.0))
                b_a += single(tl.load(p_row + o_logit, mask=m_seen, other=0.0))
                b_a = tl.where(m_seen, b_a, tl.where(o_p < P, b_unseen, float("-inf")))
                b_new = tl.maximum(b_new, b_a)
                b_logits = b_logits + (b_a,)
            b_scale = tl.exp(b_max - b_new)
            b_max = b_new
            b_sum *= b_scale
            b_scaled = ()
            for c in tl.static_range(TIMES):
                b_scaled = b_scaled + (b_acc[c] * b_scale[:, :, None],)
            b_acc = b_scaled
            b_read = ()
            for s in tl.static_range(L):
                b_w = tl.exp(b_logits[s] - b_max)
                b_sum += b_w
                b_weights, b_taps = read_level(
                    p_picture,
                    b_u,
                    b_v,
                    b_w,
                    m_seen,
                    o_d,
                    stride_vs,
                    HEIGHTS[s],
                    WIDTHS[s],
                    STARTS[s],
                    D,
                    TIMES,
                    WIDE,
                )
                if AHEAD:
                    b_read = b_read + ((b_weights, b_taps),)
                else:
                    b_acc = add_pixels(b_acc, b_weights, b_taps)
            if AHEAD:
                for s in tl.static_range(L):
                    b_acc = add_pixels(b_acc, b_read[s][0], b_read[s][1])

    b_top = tl.max(b_max, axis=1)
    b_share = tl.exp(b_max - b_top[:, None])
    b_rest = tl.exp(-b_top)
    b_total = tl.sum(b_sum * b_share, axis=1) + b_rest
    for c in tl.static_range(TIMES):
        b_out = tl.sum(b_acc[c] * b_share[:, :, None], axis=1)  # [BQ, BD]
        o_out = i_d + c * BD + tl.arange(0, BD)[None, :]
        if ignore_ptr is not None:
            b_ignore = single(tl.load(ignore_ptr + i_h * D + o_out, mask=o_out < D, other=0.0))
            b_out += b_rest[:, None] * b_ignore
        b_out = b_out / b_total[:, None]
        p_out = out_ptr + ((i_b * Q + o_q) * H + i_h) * D + o_out
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q & (o_out < D))


def feature_sync_fwd(
    values: torch.Tensor,
    queries: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    base: int,
    ignore: torch.Tensor | None,
) -> torch.Tensor:
    """Samples all pictures and levels in one launch.

    Args:
        values: [B, n, S, H, D], fp16/bf16/fp32; read in place where the channels' stride is 1, otherwise copied.
        queries: [B, Q, H * P * 2 + H * L * P], fp16/bf16/fp32; read in place where the last stride is 1.
        table: [R, H * P * 2 + H * L * P], fp16/bf16/fp32; copied if it is not contiguous.
        index: [B, Q or 1, n], int32 or int64. A query with an index below 0 or from R on becomes NaN.
        reference_points: [B or 1, Q or 1, 2], any floating point.
        spatial_shapes: (h, w) of the L levels.
        base: offset units in the width and height of a map.
        ignore: [H * D], fp16/bf16/fp32, or None.

    Returns:
        [B, Q, H * D] of values' dtype, contiguous.
    """
    batch, pictures, pixels, heads, channels = values.shape
    count, levels = queries.shape[1], len(spatial_shapes)
    points = queries.shape[2] // (heads * (2 + levels))
    values = values if values.stride(-1) == 1 else values.contiguous()
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    table = table.contiguous()
    ignore = None if ignore is None else ignore.contiguous()
    index = index.expand(batch, count, pictures)
    reference_points = reference_points.expand(batch, count, 2)
    out = values.new_empty(batch, count, heads * channels)
    architecture = triton.runtime.driver.active.get_current_target().arch if values.is_cuda else None
    tile = feature_sync_tile(
        architecture, values.element_size(), batch * count, pictures, points, channels, values.stride()[:4]
    )
    programs = batch * triton.cdiv(count, tile.queries) * heads * triton.cdiv(channels, tile.channels * tile.times)
    if programs > 0:
        feature_sync_fwd_kernel[(programs,)](
            values,
            queries,
            table,
            index,
            reference_points,
            ignore,
            out,
            count,
            pictures,
            len(table),
            *values.stride()[:4],
            *queries.stride()[:2],
            *index.stride(),
            *reference_points.stride(),
            HEIGHTS=tuple(h for h, _ in spatial_shapes),
            WIDTHS=tuple(w for _, w in spatial_shapes),
            STARTS=tuple(sum(h * w for h, w in spatial_shapes[:level]) for level in range(levels)),
            BASE=base,
            H=heads,
            P=points,
            D=channels,
            # Offsets within a picture are computed in 32 bits where they fit, with a row of room around the map.
            WIDE=(pixels + 2 * max(w for _, w in spatial_shapes)) * values.stride(2) >= 2**31,
            # This is rounded up to a power of two, so that only few numbers of pictures need to be compiled for.
            ROUNDS=triton.next_power_of_2(triton.cdiv(pictures, tile.pictures)),
            # A single query has no other to wait with, so the pixels of all its levels are asked for at once.
            AHEAD=tile.queries == 1,
            BQ=tile.queries,
            BJ=tile.pictures,
            BP=tile.points,
            BD=tile.channels,
            TIMES=tile.times,
            num_warps=tile.warps,
            # Without this limit the assembler saves registers: it waits for one pixel before it asks for the next.
            maxnreg=255 if tile.queries == 1 else None,
        )
    return out
