"""The steps of MM-Interleaved's feature synchronizer (arXiv 2401.10208, class MMFS), as the original takes them."""

import math
from collections.abc import Sequence

import torch

from .deformable_attention import reference as deformable_attention_reference
from .torch.feature_sync import points_of


def split_query(z: torch.Tensor, heads: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets [..., H, P, 2] and the logits [..., H, L, P] in z [..., H * P * 2 + H * L * P]."""
    points = points_of(z.shape[-1], heads, levels)
    offsets, logits = z.split([heads * points * 2, heads * levels * points], dim=-1)
    return offsets.unflatten(-1, (heads, points, 2)), logits.unflatten(-1, (heads, levels, points))


def reference(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> torch.Tensor:
    """The steps of the original on the queries that the table's rows were added to, for each picture."""
    offsets, logits = split_query(queries[:, :, None] + table[index], values.shape[3], len(spatial_shapes))
    # The original computes a logit for what is ignored, too, which `read_pictures` replaces.
    logits = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], 1)], dim=-1)
    return read_pictures(values, offsets, logits, index > 0, reference_points, spatial_shapes, base, ignore)


def read_pictures(
    values: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    seen: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    base: int,
    ignore: torch.Tensor | None,
) -> torch.Tensor:
    """The steps of MM-Interleaved's MMFS between its projections, with its tensors for every picture, level and point.

    Every (picture, level) has a slot of its own for what is ignored, with the logit -ln(n * L), so that all of them
    together weigh one. The logits of masked pictures are lowered by 10000.

    Args:
        offsets: [B, Q, n, H, P, 2], (x, y).
        logits: [B, Q, n, H, L, P + 1]; the last of each level is for what is ignored, and its value does not matter.
        seen: [B, Q, n] or [B, 1, n], bool.

    The other arguments and the result are those of `feature_sync`.
    """
    batch, pictures, pixels, heads, channels = values.shape
    levels, (count, points) = len(spatial_shapes), (offsets.shape[1], offsets.shape[4])
    if pictures == 0:
        out = values.new_zeros(batch, count, heads * channels)
        return out if ignore is None else out + ignore
    dtype = offsets.dtype
    # One copy of the offsets for every level: scaled to the level's pixels, then divided by its size.
    sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=torch.float32).to(values.device)
    at_level = offsets[:, :, :, :, None] * (sizes / base).to(dtype)[:, None] / sizes.to(dtype)[:, None]
    locations = reference_points[:, :, None, None, None, None] + at_level  # [B, Q, n, H, L, P, 2]
    locations = locations.movedim(2, 3).reshape(batch, count, heads, pictures * levels, points, 2)

    logits = logits + (~seen)[:, :, :, None, None, None].to(logits.dtype) * -10000.0
    logits[..., -1] = -math.log(pictures * levels)
    weights = logits.movedim(2, 3).flatten(3).softmax(-1)  # over n * L * (P + 1)
    weights = weights.unflatten(-1, (pictures * levels, points + 1))
    out = deformable_attention_reference(
        values.flatten(1, 2), list(spatial_shapes) * pictures, locations, weights[..., :-1].contiguous()
    )
    if ignore is not None:
        # The original, too, repeats the token for every picture and level, and adds the products up.
        tokens = ignore.repeat(batch, count, pictures * levels, 1).unflatten(-1, (heads, channels)).movedim(3, 2)
        out = out + (tokens * weights[..., -1:]).sum(3).flatten(2).to(out.dtype)
    return out
