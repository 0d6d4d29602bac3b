"""Deformable attention as sums of weighted rows: the `torch` backend of `ops.deformable_attention`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Pixels(NamedTuple):
    """The four pixels that every sample is made of: upper left, upper right, lower left and lower right.

    Attributes:
        rows: four tensors [B, Q, H, L, P]: the row (picture * S + pixel) * H + head of value [B * S * H, D] that the
            pixel lies in, and B * S * H for a pixel outside. int32 where it can hold that number, and else int64.
        right, low: [B, Q, H, L, P], how far the sample is to the right of the upper left pixel and below it, 0 to 1.
    """

    rows: tuple[torch.Tensor, ...]
    right: torch.Tensor
    low: torch.Tensor


def pixels_of(locations: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Pixels:
    """The pixels of every sample at `locations` [B, Q, H, L, P, 2] of maps of these sizes."""
    batch, _, heads = locations.shape[:3]
    device, total = locations.device, sum(h * w for h, w in spatial_shapes)
    none = batch * total * heads
    integer = torch.int32 if none < 2**31 else torch.int64
    starts = [sum(h * w for h, w in spatial_shapes[:level]) for level in range(len(spatial_shapes))]

    def by_level(numbers: Sequence[int]) -> torch.Tensor:
        # A tensor that is made of a list would be copied to a GPU, for which the host waits.
        return torch.stack([torch.full((1,), number, dtype=integer, device=device) for number in numbers])

    h, w = (by_level(sides) for sides in zip(*spatial_shapes))
    pictures = torch.arange(batch, dtype=integer, device=device)[:, None, None, None, None] * (total * heads)
    first = pictures + torch.arange(heads, dtype=integer, device=device)[:, None, None] + by_level(starts) * heads
    x, y = locations.unbind(-1)
    x, y = x * w - 0.5, y * h - 0.5
    # Every comparison with NaN is false. Other numbers must not reach the conversion to integers.
    inside = (x >= -1) & (x < w) & (y >= -1) & (y < h)
    x, y = x.where(inside, 0), y.where(inside, 0)
    left, top = x.floor(), y.floor()
    right, low = x - left, y - top
    left, top = left.to(integer), top.to(integer)
    row = (top * w + left) * heads + first
    in_columns = (left >= 0) & inside, (left + 1 < w) & inside
    in_rows = top >= 0, top + 1 < h
    rows = tuple(
        (row + (below * w + beside) * heads).where(in_rows[below] & in_columns[beside], none)
        for below in (0, 1)
        for beside in (0, 1)
    )
    return Pixels(rows, right, low)


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """`mg_fast.ops.deformable_attention` in PyTorch."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    # Pixels outside are the last row. Zeros that are read leave NaN of weights visible.
    rows = torch.cat([value.reshape(-1, channels).to(dtype), value.new_zeros(1, channels, dtype=dtype)])
    pixels = pixels_of(sampling_locations.to(dtype), spatial_shapes)
    lower = attention_weights.to(dtype) * pixels.low
    upper = attention_weights - lower
    out = 0
    for index, coefficient in zip(
        pixels.rows,
        (upper * (1 - pixels.right), upper * pixels.right, lower * (1 - pixels.right), lower * pixels.right),
    ):
        bags = (batch * queries * heads, index.shape[3] * index.shape[4])
        out = out + F.embedding_bag(index.reshape(bags), rows, per_sample_weights=coefficient.reshape(bags), mode="sum")
    return out.view(batch, queries, heads * channels).to(value.dtype)
