"""The synchronizer's core in PyTorch: the `torch` backend of `ops.feature_sync`.

Locations and weights are made for some queries at a time, so that little memory is needed for many of them. Each
picture's levels count as levels of one map, which the form of deformable attention reads where it lies.
"""

from collections.abc import Callable, Sequence

import torch

from ..deformable_attention import reference as deformable_attention

# The most samples (heads, pictures, levels and points of some queries) whose locations and weights exist together.
SAMPLES = 2**19


def feature_sync(
    values: torch.Tensor,
    queries: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    base: int,
    ignore: torch.Tensor | None,
    *,
    gather: Callable[..., torch.Tensor] = deformable_attention,
) -> torch.Tensor:
    """`mg_fast.ops.feature_sync` in PyTorch; `gather` replaces the form of deformable attention that reads samples.

    A query with an index that the table does not have is NaN, as in the kernel, because to raise an error would mean
    to wait for the device.
    """
    batch, pictures, _, heads, channels = values.shape
    count = queries.shape[1]
    if pictures == 0 or 0 in (batch, count):
        out = values.new_zeros(batch, count, heads * channels)
        return out if ignore is None else out + ignore
    samples = batch * heads * pictures * queries.shape[2] // heads
    # A compiler's graph should be small, so it is not cut.
    step = count if torch.compiler.is_compiling() else max(1, SAMPLES // samples)
    index, reference_points = index.expand(-1, count, -1), reference_points.expand(-1, count, -1)
    parts = [
        _some(values, *part, table, spatial_shapes, base, ignore, gather)
        for part in zip(*(tensor.split(step, dim=1) for tensor in (queries, index, reference_points)))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _some(values, queries, index, reference_points, table, spatial_shapes, base, ignore, gather) -> torch.Tensor:
    """The result for some queries; index [B, Q, n] and reference_points [B or 1, Q, 2] are theirs alone."""
    pictures, _, heads, channels = values.shape[1:]
    levels, count = len(spatial_shapes), queries.shape[1]
    points = queries.shape[2] // (heads * (2 + levels))
    dtype = torch.promote_types(torch.promote_types(values.dtype, queries.dtype), torch.float32)
    seen = (index > 0) & (index < len(table))
    rows = table.index_select(0, index.flatten().clamp(0, len(table) - 1)).view(*index.shape, -1)
    z = rows.to(dtype) + queries[:, :, None]
    offsets, logits = z.split([heads * points * 2, heads * levels * points], dim=-1)
    offsets = offsets.view(*index.shape, heads, 1, points, 2)
    logits = logits.view(*index.shape, heads, levels, points)

    unseen = torch.where(index == 0, -torch.inf, torch.nan).to(dtype)
    logits = logits.where(seen[..., None, None, None], unseen[..., None, None, None])
    # The result does not depend on the number that is subtracted. The logit of the added one is 0.
    most = logits.detach().amax((2, 4, 5), keepdim=True).clamp(min=0)
    weights, rest = (logits - most).exp(), (-most).exp()
    total = weights.sum((2, 4, 5), keepdim=True) + rest
    weights = (weights / total).movedim(2, 3).flatten(3, 4)  # [B, Q, H, n * L, P]

    locations = reference_points[:, :, None, None, None, None].to(dtype) + offsets / base
    # A location that is not finite reads nothing, whatever the picture holds.
    locations = locations.where(seen[..., None, None, None, None], torch.inf)
    locations = locations.movedim(2, 3).expand(-1, -1, -1, -1, levels, -1, -1).flatten(3, 4)
    out = gather(values.flatten(1, 2), list(spatial_shapes) * pictures, locations, weights)
    if ignore is not None:
        share = (rest / total).reshape(-1, count, heads, 1) * ignore.view(heads, channels)
        out = (out + share.flatten(2)).to(values.dtype)
    return out
