"""The synchronizer's core in PyTorch: the `torch` backend of `ops.feature_sync`.

Locations and weights are made for some queries at a time, so that little memory is needed for many of them. Then the
levels of all pictures count as levels of one map, which the form of deformable attention reads. Where the queries are
so few that most pixels of the values are not needed, only those that are needed are copied.
"""

from collections.abc import Callable, Sequence

import torch

from .deformable_attention import deformable_attention

# The most samples (heads, pictures, levels and points of some queries) whose locations and weights exist together.
SAMPLES = 2**19
# Pixels are copied one by one where they are at most this share of the values' pixels. The other way makes a float32
# copy of all 16-bit values first.
FEW = 1 / 4


def points_of(width: int, heads: int, levels: int) -> int:
    """The points P of queries of this width, H * P * 2 + H * L * P; 0 if no whole number of points has it."""
    each = heads * (2 + levels)
    return 0 if each == 0 or width % each else width // each


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
    gather: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """`mg_fast.ops.feature_sync` in PyTorch.

    `gather(values, spatial_shapes, locations [B, Q, n, H, P, 2], weights [B, Q, n, H, L, P])` replaces the function
    that adds up weighted samples, [B, Q, H * D] in the dtype of values.

    A query with an index that the table does not have is NaN, as in the kernel: an error could only be raised after
    waiting for the device.
    """
    batch, pictures, pixels, heads, channels = values.shape
    count, levels = queries.shape[1], len(spatial_shapes)
    if pictures == 0 or 0 in (batch, count):
        out = values.new_zeros(batch, count, heads * channels)
        return out if ignore is None else out + ignore
    points = points_of(queries.shape[2], heads, levels)
    if gather is None:
        gather = _by_pixels if 4 * count * levels * points <= FEW * pixels else _by_levels
    # A compiler's graph should be small, so there the queries are not cut into parts.
    samples = batch * pictures * heads * levels * points
    step = count if torch.compiler.is_compiling() else max(1, SAMPLES // samples)
    index, reference_points = index.expand(-1, count, -1), reference_points.expand(-1, count, -1)
    parts = [
        _some(values, *part, table, spatial_shapes, base, ignore, gather)
        for part in zip(*(tensor.split(step, dim=1) for tensor in (queries, index, reference_points)))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _some(values, queries, index, reference_points, table, spatial_shapes, base, ignore, gather) -> torch.Tensor:
    """The result for some queries; index [B, Q, n] and reference_points [B or 1, Q, 2] are theirs alone."""
    heads, channels = values.shape[3:]
    levels, count = len(spatial_shapes), queries.shape[1]
    points = points_of(queries.shape[2], heads, levels)
    dtype = torch.promote_types(torch.promote_types(values.dtype, queries.dtype), torch.float32)
    seen = (index > 0) & (index < len(table))
    rows = table.index_select(0, index.flatten().clamp(0, len(table) - 1)).view(*index.shape, -1)
    z = rows.to(dtype) + queries[:, :, None]
    offsets, logits = z.split([heads * points * 2, heads * levels * points], dim=-1)
    offsets = offsets.view(*index.shape, heads, points, 2)
    logits = logits.view(*index.shape, heads, levels, points)
    # A location that is not finite reads nothing, whatever the picture holds.
    locations = reference_points[:, :, None, None, None].to(dtype) + offsets / base
    locations = locations.where(seen[..., None, None, None], torch.inf)

    unseen = torch.where(index == 0, -torch.inf, torch.nan).to(dtype)
    logits = logits.where(seen[..., None, None, None], unseen[..., None, None, None])
    # The result does not depend on the number that is subtracted. The logit of the added one is 0.
    most = logits.detach().amax((2, 4, 5), keepdim=True).clamp(min=0)
    weights, rest = (logits - most).exp(), (-most).exp()
    total = weights.sum((2, 4, 5), keepdim=True) + rest
    out = gather(values, spatial_shapes, locations, weights / total)
    if ignore is not None:
        share = (rest / total).view(-1, count, heads, 1) * ignore.view(heads, channels)
        out = out + share.flatten(2)
    return out.to(values.dtype)


def _by_levels(values, spatial_shapes, locations, weights) -> torch.Tensor:
    """The levels of all pictures are levels of one map."""
    pictures, levels = values.shape[1], len(spatial_shapes)
    # [B, Q, H, n * L, P, 2] and [B, Q, H, n * L, P].
    locations = locations[:, :, :, :, None].expand(-1, -1, -1, -1, levels, -1, -1).movedim(2, 3).flatten(3, 4)
    weights = weights.movedim(2, 3).flatten(3, 4)
    return deformable_attention(values.flatten(1, 2), list(spatial_shapes) * pictures, locations, weights)


def _by_pixels(values, spatial_shapes, locations, weights) -> torch.Tensor:
    """Copies the four pixels of every sample, and multiplies them by their weights."""
    batch, pictures, pixels, heads, channels = values.shape
    count, dtype, device = locations.shape[1], weights.dtype, values.device

    def by_level(numbers: Sequence[int]) -> torch.Tensor:
        # A list would have to be copied to a GPU, for which the host would wait.
        return torch.cat([torch.full((1, 1), number, device=device) for number in numbers])

    def numbered(number: int) -> torch.Tensor:
        return torch.arange(number, device=device)[:, None, None]

    (h, w), sizes = (by_level(sides) for sides in zip(*spatial_shapes)), [h * w for h, w in spatial_shapes]
    start = by_level([sum(sizes[:level]) for level in range(len(sizes))])
    x, y = locations[..., None, :, :].unbind(-1)  # [B, Q, n, H, 1, P]
    x, y = x * w - 0.5, y * h - 0.5
    # Every comparison with NaN is false. Other numbers must not reach the conversion to integers.
    inside = (x >= -1) & (x < w) & (y >= -1) & (y < h)
    x, y = x.where(inside, 0), y.where(inside, 0)
    left, top = x.detach().floor(), y.detach().floor()
    right, below = x - left, (y - top) * weights
    above = weights - below
    left, top = left.long(), top.long()
    picture = numbered(batch * pictures).view(batch, 1, pictures, 1, 1, 1)
    row = ((picture * pixels + start) + top * w + left) * heads + numbered(heads)
    columns, lines = (left >= 0, left < w - 1), (inside & (top >= 0), inside & (top < h - 1))

    def by_query(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Reorders four tensors [B, Q, n, H, L, P] to one of [B * Q * H, n * L * P * 4]."""
        return torch.stack(tuple(numbers), dim=-1).transpose(2, 3).reshape(batch * count * heads, -1)

    rows = by_query((row, row + heads, row + w * heads, row + (w + 1) * heads))
    inside = by_query(line & column for line in lines for column in columns)
    weights = by_query((above - above * right, above * right, below - below * right, below * right))
    # A pixel outside of its map weighs nothing. In its place another pixel is read that the query reads anyway, so that
    # nothing is seen that the query does not see. A query without any pixel gets the sum of its weights, which is 0 or
    # NaN.
    most = rows.where(inside, -1).amax(-1, keepdim=True)
    weights = weights * inside
    found = values.reshape(-1, channels).index_select(0, rows.where(inside, most.clamp(min=0)).flatten())
    found = found.view(*rows.shape, channels).to(dtype)
    if weights.requires_grad:
        # The gradient of a weight is a product with the pixel, which must not be NaN for a query without any pixel.
        found = found.masked_fill((most < 0)[..., None], 0)
    out = torch.bmm(weights[:, None], found).squeeze(1)
    out = out.where(most >= 0, weights.sum(-1, keepdim=True))
    return out.view(batch, count, heads * channels).to(values.dtype)
