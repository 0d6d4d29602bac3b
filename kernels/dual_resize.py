"""A picture resized to both resolutions, in two launches.

HR = table[clip(sum_k w_k clip(sum_l v_l x_kl))] and LR = bilinear(HR). The sums are Pillow's: weights are int32 in
units of 2**-22, and the sums are rounded to 8 bits after the pass over columns and again after the pass over rows. The
first launch resizes the columns of the picture [H, W, 3] uint8, of any strides, to [rows, 3, HR] uint8, and adds a row
of padding. The second launch resizes the rows and looks the normalised pixels up. The padded square, a float picture
and the canvas of the LR tiles never exist: taps outside the picture have the colour of the padding, and each LR pixel
computes again the HR pixels that it is made of, 4 for a tile and 16 for the global view.

All arithmetic is integers and tables, so HR has Pillow's bits on any GPU. Where the picture is on the host and no model
waits for it, Pillow may as well resize it there while the GPU does something else.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import dual_resize_tile

SIZES = ["stride_y", "stride_x", "stride_c", "low", "height", "width", "size", "taps"]


class Taps(NamedTuple):
    """The taps of every pixel along one side of the result, both tensors int32.

    Attributes:
        first: [size], the first tap in the picture.
        weights: [K, size].
    """

    first: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _rounded(b_sum):
    """Rounds a fixed-point number to 8 bits, as int32."""
    BITS: tl.constexpr = 22
    HALF: tl.constexpr = 1 << 21
    return tl.minimum(tl.maximum((b_sum + HALF) >> BITS, 0), 255)


@triton.jit
def _pixels(pointers, mask, COLOUR: tl.constexpr, C: tl.constexpr):
    """One channel of the picture as int32; pixels outside it have the colour of the padding."""
    PADDING: tl.constexpr = COLOUR[C]
    return tl.load(pointers, mask=mask, other=PADDING).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def resize_columns_fwd_kernel(
    picture_ptr,
    first_ptr,
    weights_ptr,
    between_ptr,
    stride_y,
    stride_x,
    stride_c,
    low,
    height,
    width,
    size,
    taps,
    COLOUR: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
):
    o_y = tl.program_id(0).to(tl.int64) * BY + tl.arange(0, BY)
    o_x = tl.program_id(1) * BX + tl.arange(0, BX)
    m_x = o_x < size
    # The row after the last one is all padding.
    m_y = o_y < height
    b_first = tl.load(first_ptr + o_x, mask=m_x, other=0)
    for i_c in tl.static_range(3):
        p_row = picture_ptr + (o_y + low) * stride_y + i_c * stride_c
        b_sum = tl.zeros([BY, BX], tl.int32)
        # A `range` up to a number that is not constant cannot be interpreted by Triton 3.6 with NumPy 2.4 and newer.
        # For a GPU this loop is compiled to the same instructions.
        i_k = 0
        while i_k < taps:
            b_weight = tl.load(weights_ptr + i_k * size + o_x, mask=m_x, other=0)  # [BX]
            o_t = b_first + i_k
            m_t = m_y[:, None] & (m_x & (o_t >= 0) & (o_t < width))[None, :]
            b_x = _pixels(p_row[:, None] + (o_t.to(tl.int64) * stride_x)[None, :], m_t, COLOUR, i_c)  # [BY, BX]
            b_sum += b_weight[None, :] * b_x
            i_k += 1
        p_out = between_ptr + (o_y[:, None] * 3 + i_c) * size + o_x[None, :]
        tl.store(p_out, _rounded(b_sum).to(tl.uint8), mask=(o_y <= height)[:, None] & m_x[None, :])


@triton.jit
def _levels(between_ptr, first_ptr, weights_ptr, o_y, m_y, o_x, m_x, i_c, low, height, size, taps):
    """The 8-bit levels of the pixels (o_y, o_x) of the squared picture, as int32."""
    b_first = tl.load(first_ptr + o_y, mask=m_y, other=0) - low
    p_column = between_ptr + i_c * size + o_x
    b_sum = tl.zeros([o_y.shape[0], o_x.shape[0]], tl.int32)
    i_k = 0
    while i_k < taps:
        b_weight = tl.load(weights_ptr + i_k * size + o_y, mask=m_y, other=0)
        o_t = b_first + i_k
        o_t = tl.where((o_t >= 0) & (o_t < height), o_t, height).to(tl.int64)
        b_x = tl.load(p_column[None, :] + (o_t * (3 * size))[:, None], mask=m_y[:, None] & m_x[None, :], other=0)
        b_sum += b_weight[:, None] * b_x.to(tl.int32)
        i_k += 1
    return _rounded(b_sum)


@triton.jit(do_not_specialize=["low", "height", "size", "taps", "lr_size", "grid", "global_size"])
def resize_rows_fwd_kernel(
    between_ptr,
    first_ptr,
    weights_ptr,
    table_ptr,
    positions_ptr,
    shares_ptr,
    hr_ptr,
    views_ptr,
    low,
    height,
    size,
    taps,
    lr_size,
    grid,
    global_size,
    BY: tl.constexpr,
    BX: tl.constexpr,
):
    i = tl.program_id(0)
    i_c = tl.program_id(1).to(tl.int64)
    canvas = lr_size * grid
    hr_tiles = tl.cdiv(size, BY) * tl.cdiv(size, BX)
    canvas_tiles = tl.cdiv(canvas, BY) * tl.cdiv(canvas, BX)
    entries = size + canvas + global_size
    # The HR picture, the canvas of LR tiles and the global view differ in these values only: pixels along a side, first
    # entry in the tables, taps, side of one picture, index of the first picture, output pointer.
    if i < hr_tiles:
        n, entry, count, side, i_view, p_out = size, 0, 1, size, 0, hr_ptr
    elif i < hr_tiles + canvas_tiles:
        i -= hr_tiles
        n, entry, count, side, i_view, p_out = canvas, size, 2, lr_size, 0, views_ptr
    else:
        i -= hr_tiles + canvas_tiles
        n, entry, count, side, i_view, p_out = lr_size, size + canvas, 4, lr_size, grid * grid, views_ptr
    across = tl.cdiv(n, BX)
    o_y = i // across * BY + tl.arange(0, BY)
    o_x = i % across * BX + tl.arange(0, BX)
    m_y, m_x = o_y < n, o_x < n
    b_out = tl.zeros([BY, BX], tl.float32)
    for i_y in range(count):
        o_row = i_y * entries + entry + o_y
        b_py = tl.load(positions_ptr + o_row, mask=m_y, other=0)
        b_wy = tl.load(shares_ptr + o_row, mask=m_y, other=0.0)
        b_row = tl.zeros([BY, BX], tl.float32)
        for i_x in range(count):
            o_column = i_x * entries + entry + o_x
            b_px = tl.load(positions_ptr + o_column, mask=m_x, other=0)
            b_wx = tl.load(shares_ptr + o_column, mask=m_x, other=0.0)
            b_level = _levels(between_ptr, first_ptr, weights_ptr, b_py, m_y, b_px, m_x, i_c, low, height, size, taps)
            b_row += b_wx[None, :] * tl.load(
                table_ptr + i_c * 256 + b_level, mask=m_y[:, None] & m_x[None, :], other=0.0
            )
        b_out += b_wy[:, None] * b_row
    o_view = (i_view + (o_y // side * grid)[:, None] + (o_x // side)[None, :]).to(tl.int64)
    o_pixel = ((o_view * 3 + i_c) * side + (o_y % side)[:, None]) * side + (o_x % side)[None, :]
    tl.store(p_out + o_pixel, b_out, mask=m_y[:, None] & m_x[None, :])


def dual_resize_fwd(
    picture: torch.Tensor,
    columns: Taps,
    rows: Taps,
    low: int,
    high: int,
    table: torch.Tensor,
    positions: torch.Tensor,
    shares: torch.Tensor,
    *,
    colour: tuple[int, int, int],
    lr_size: int,
    grid: int,
    global_view: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resizes a picture to both resolutions.

    Args:
        picture: [H, W, 3] uint8, any strides.
        columns, rows: the taps of the pixels along the result's sides. Of the picture's rows, those before `low` and
            from `high` on are not read.
        low, high: rows [low, high) of the picture are resized; taps outside have the colour of the padding.
        table: [3, 256] fp32, the normalised pixel of every channel and level.
        positions, shares: [4, HR + grid * LR + LR], int32 and fp32. The HR pixels along a side that make up a pixel,
            and their weights: for the HR picture (1 tap, the pixel itself), for the canvas of tiles (2 taps) and, with
            `global_view` only, for the global view (4 taps).
        colour: of the padding.
        lr_size: side of an LR view in pixels.
        grid: tiles along a side of the LR canvas.
        global_view: make the global view too.

    Returns:
        [3, HR, HR] and [V, 3, LR, LR], fp32.
    """
    size, height = columns.first.shape[0], high - low
    architecture = triton.runtime.driver.active.get_current_target().arch if picture.is_cuda else None
    between = torch.empty(height + 1, 3, size, dtype=torch.uint8, device=picture.device)
    hr = torch.empty(3, size, size, dtype=torch.float32, device=picture.device)
    views = torch.empty(grid * grid + global_view, 3, lr_size, lr_size, dtype=torch.float32, device=picture.device)
    tile = dual_resize_tile(architecture, "columns")
    resize_columns_fwd_kernel[(triton.cdiv(height + 1, tile.rows), triton.cdiv(size, tile.columns))](
        picture,
        columns.first,
        columns.weights,
        between,
        *picture.stride(),
        low,
        height,
        picture.shape[1],
        size,
        columns.weights.shape[0],
        COLOUR=colour,
        BY=tile.rows,
        BX=tile.columns,
        num_warps=tile.warps,
    )
    tile = dual_resize_tile(architecture, "rows")
    sides = [size, lr_size * grid] + [lr_size] * global_view
    programs = sum(triton.cdiv(n, tile.rows) * triton.cdiv(n, tile.columns) for n in sides)
    resize_rows_fwd_kernel[(programs, 3)](
        between,
        rows.first,
        rows.weights,
        table,
        positions,
        shares,
        hr,
        views,
        low,
        height,
        size,
        rows.weights.shape[0],
        lr_size,
        grid,
        lr_size * global_view,
        BY=tile.rows,
        BX=tile.columns,
        num_warps=tile.warps,
    )
    return hr, views
