"""Deformable attention as weighted sums of rows of values: the `torch` backend of `ops.deformable_attention`.

A sample is a sum of four pixels, and a pixel of one head is a row of value [S * H, D]. So the result of a query and
head is a weighted sum of L * P * 4 rows, which `F.embedding_bag` makes without storing a sample. Queries are taken a
few at a time, so that their rows and weights stay in the cache. grid_sample makes a copy of value and a tensor of all
samples. It serves here for a handful of samples, and where gradients are wanted, which it computes with less work.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Samples that are made together: on a CPU so few that their rows and weights stay in the cache, and on a GPU so many
# that it is kept busy.
TOGETHER, TOGETHER_ON_A_GPU = 2**15, 2**22
# With fewer samples than this of a value with at most so many elements, the steps before the sum take longer than all
# of grid_sample.
FEWEST, SMALLEST = 2**10, 2**21


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """`mg_fast.ops.deformable_attention` in PyTorch. All products of 16-bit values are float32."""
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    tensors = value, sampling_locations, attention_weights
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    few = attention_weights.numel() < FEWEST and (value.numel() <= SMALLEST or attention_weights.numel() == 0)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if trained or few:
        return by_grid_sample(value.to(dtype), spatial_shapes, locations, weights).to(value.dtype)
    return by_sums_of_rows(value, spatial_shapes, locations, weights)


def by_grid_sample(
    value: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Samples every level by grid_sample. All tensors have one dtype; so has the result, but for autocast's widening.

    These are the steps of `ms_deform_attn_core_pytorch` of Deformable DETR, and of transformers. Its CUDA kernel leaves
    out locations that are not finite. grid_sample does not promise that, so they are moved outside of the map here.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    channels = value.shape[-1]
    grids = 2 * locations.where(locations.isfinite().all(-1, keepdim=True), -2.0) - 1
    samples = []
    for level, (map, (h, w)) in enumerate(zip(value.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes)):
        map = map.flatten(2).transpose(1, 2).reshape(batch * heads, channels, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1).view(batch, heads * channels, queries)
    return out.transpose(1, 2).contiguous()


def by_sums_of_rows(
    value: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Adds up rows of value in the dtype of locations and weights, for some queries of a picture at a time.

    The result has value's dtype. There is at least one sample.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    pixels, channels = value.shape[1], value.shape[-1]
    dtype, device, each = locations.dtype, value.device, heads * levels * points
    compiling = torch.compiler.is_compiling()
    together = TOGETHER if device.type == "cpu" else TOGETHER_ON_A_GPU
    at_once = queries if compiling else min(queries, max(1, together // each))
    sizes, first = _sizes(spatial_shapes, heads, points, dtype, device, pixels * heads)
    # Tensors without broadcasting are faster to compute with.
    sizes = sizes[:, None, None].expand(2, at_once, heads, levels * points).contiguous()
    first = (
        (first + torch.arange(heads, dtype=first.dtype, device=device)[:, None]).expand(sizes.shape[1:]).contiguous()
    )
    parts = []
    for picture in range(batch):
        rows, outside = value[picture].reshape(-1, channels).to(dtype).contiguous(), 0
        # What is outside of the maps reads the first row with a weight of zero, or a row of zeros if that would not be
        # zero. A GPU's host would wait for the answer.
        if compiling or device.type != "cpu" or not rows[0].isfinite().all():
            rows, outside = torch.cat([rows, rows.new_zeros(1, channels)]), pixels * heads
        # A range would make the number of queries a constant of a trace.
        for top in (0,) if compiling else range(0, queries, at_once):
            some = slice(top, top + at_once)
            at = locations[picture, some].flatten(2, 3).movedim(-1, 0).contiguous()
            count = at.shape[1]
            found, near, far = _pixels(at, sizes[:, :count], first[:count], heads, outside)
            lower = weights[picture, some].flatten(2)
            upper = lower * near[1]
            lower = lower * far[1]
            shares = upper * near[0], upper * far[0], lower * near[0], lower * far[0]
            total = 0
            for row, share in zip(found, shares):
                bags = count * heads, levels * points
                total = total + F.embedding_bag(row.view(bags), rows, per_sample_weights=share.view(bags), mode="sum")
            parts.append(total.view(count, heads * channels).to(value.dtype))
    return torch.cat(parts).view(batch, queries, heads * channels)


def pixel_rows(locations: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The rows of value [B * S * H, D] that samples at `locations` [B, Q, H, L, P, 2] read, [B, Q, H, L * P, 4].

    The pixels of a sample are the upper left, the upper right, the lower left and the lower right one. The row of a
    pixel outside is B * S * H. The result is int32 where that can hold this number, and else int64.
    """
    batch, _, heads, _, points, _ = locations.shape
    pixels = sum(h * w for h, w in spatial_shapes)
    none = batch * pixels * heads
    sizes, first = _sizes(spatial_shapes, heads, points, locations.dtype, locations.device, none)
    pictures, each = (torch.arange(n, dtype=first.dtype, device=first.device) for n in (batch, heads))
    first = first + (pictures * (pixels * heads))[:, None, None, None] + each[:, None]
    at = locations.flatten(3, 4).movedim(-1, 0)
    return torch.stack(_pixels(at, sizes[:, None, None, None], first, heads, none)[0], dim=-1)


def _sizes(
    spatial_shapes: Sequence[tuple[int, int]],
    heads: int,
    points: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every level and point: width and height [2, L * P], and the row of the level's first pixel [L * P].

    The rows are int32 if there are so few that it can hold their number, and else int64.
    """
    integer = torch.int32 if rows < 2**31 else torch.int64
    starts = [heads * sum(h * w for h, w in spatial_shapes[:level]) for level in range(len(spatial_shapes))]

    def repeated(numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # A list would have to be copied to a GPU, for which the host would wait.
        return torch.cat([torch.full((points,), number, dtype=dtype, device=device) for number in numbers])

    heights, widths = zip(*spatial_shapes)
    return torch.stack([repeated(widths, dtype), repeated(heights, dtype)]), repeated(starts, integer)


def _pixels(
    locations: torch.Tensor, sizes: torch.Tensor, first: torch.Tensor, heads: int, outside: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The rows of the four pixels of every sample, and their shares.

    Args:
        locations: [2, ...], x and y.
        sizes: width and height of the maps, that many or broadcast.
        first: the row of each map's first pixel for the head.
        heads: rows from one pixel to the next.
        outside: the row of pixels outside.

    Returns:
        Rows of the upper left, upper right, lower left and lower right pixels; the shares [2, ...] of the left columns
        and the upper rows, and those of the right columns and the lower rows. Both are zero outside.
    """
    # Wherever a sample lies farther outside, it has no pixel. NaN is taken for such a place.
    at = torch.minimum((locations * sizes - 0.5).nan_to_num(nan=-2.0).clamp(min=-2.0), sizes + 1)
    floor = at.floor()
    far = at - floor
    position, side = floor.to(first.dtype), sizes.to(first.dtype)
    near_in, far_in = (position >= 0) & (position < side), (position >= -1) & (position < side - 1)
    row = (position[1] * side[0] + position[0]) * heads + first
    below = row + side[0] * heads
    rows = [
        row.where(near_in[1] & near_in[0], outside),
        (row + heads).where(near_in[1] & far_in[0], outside),
        below.where(far_in[1] & near_in[0], outside),
        (below + heads).where(far_in[1] & far_in[0], outside),
    ]
    return rows, (1 - far) * near_in, far * far_in
