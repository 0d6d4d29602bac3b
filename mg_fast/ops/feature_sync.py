"""The core of MM-Interleaved's feature synchronizer: every query reads a few points of every picture that it sees."""

import math
from collections.abc import Sequence

import torch

from . import backend as backends
from .deformable_attention import check_spatial_shapes
from .deformable_attention import reference as deformable_attention_reference
from .operation import Operation, register

__all__ = ["feature_sync"]


def feature_sync(
    values: torch.Tensor,
    queries: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    base: int,
    ignore: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Deformable attention over pictures, levels and points at once, with one added to the softmax's denominator.

    For picture j with index r_j > 0, z_j = queries + table[r_j] holds the offsets o [H, P, 2] as (x, y) and the logits
    a [H, L, P] of every query, in this order. One set of offsets serves all levels: a query reads every level at
    reference + o / base. The result of a head is

        (ignore + sum exp(a) * sample) / (1 + sum exp(a)),

    where both sums run over the pictures with r_j > 0, their levels and points. A picture with r_j = 0 is not read.

    Args:
        values: [B, n, S, H, D], floating point: for each of n pictures the projected maps of all levels one after the
            other, each row by row. Any strides; fastest with unit channel stride. `expand` serves rows that share
            pictures.
        queries: [B, Q, H * P * 2 + H * L * P], floating point.
        table: [R, H * P * 2 + H * L * P], in the dtype of queries: what is added for a picture of each index.
        index: [B, Q, n] or [B, 1, n], int32 or int64: the relative index of every picture, below R; 0 for a picture
            that the query does not see. The most recent visible picture has index 1.
        reference_points: [B, Q, 2], or with 1 in place of B or Q, floating point, (x, y) in [0, 1]; read in float32.
        spatial_shapes: (h, w) of every level, whole numbers on the host. S is the sum of h * w.
        base: the number of offset units in the width and in the height of a map.
        ignore: [H * D] in the dtype of values, what the mass of the added one reads; None stands for zeros.
        backend: overrides the choice in force.

    Returns:
        [B, Q, H * D] in the dtype of values. Where a query sees no picture it is `ignore`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.

    Source: MM-Interleaved (arXiv 2401.10208), class MMFS.
    """
    arguments = values, queries, table, index, reference_points, spatial_shapes, base, ignore
    form = backends.choose_form(FEATURE_SYNC, backend, values.device, *arguments)
    shapes = [(int(h), int(w)) for h, w in spatial_shapes]
    return form(values, queries, table, index, reference_points, shapes, base, ignore)


def points_of(width: int, heads: int, levels: int) -> int:
    """The points P of queries of this width, H * P * 2 + H * L * P; 0 if no whole number of points has it."""
    each = heads * (2 + levels)
    return 0 if each == 0 or width % each else width // each


def split_query(z: torch.Tensor, heads: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets [..., H, P, 2] and the logits [..., H, L, P] in z [..., H * P * 2 + H * L * P]."""
    points = points_of(z.shape[-1], heads, levels)
    offsets, logits = z.split([heads * points * 2, heads * levels * points], dim=-1)
    return offsets.unflatten(-1, (heads, points, 2)), logits.unflatten(-1, (heads, levels, points))


def _check(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> None:
    for name, tensor, layout in (
        ("values", values, "[B, n, S, H, D]"),
        ("queries", queries, "[B, Q, H * P * 2 + H * L * P]"),
        ("table", table, "[R, H * P * 2 + H * L * P]"),
        ("index", index, "[B, Q, n] or [B, 1, n]"),
        ("reference_points", reference_points, "[B or 1, Q or 1, 2]"),
        ("ignore", ignore, "[H * D]"),
    ):
        if tensor is None:
            continue
        if tensor.dim() != layout.split("]")[0].count(",") + 1:
            raise ValueError(f"feature_sync: {name} must be {layout}, got {list(tensor.shape)}")
        if name == "index":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"feature_sync: index must be torch.int32 or torch.int64, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ValueError(f"feature_sync: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != values.device:
            raise ValueError(f"feature_sync: {name} must be on {values.device} as values are, got {tensor.device}")
    batch, pictures, pixels, heads, channels = values.shape
    check_spatial_shapes("feature_sync", spatial_shapes, pixels)
    levels, count, width = len(spatial_shapes), queries.shape[1], queries.shape[-1]
    if queries.shape[0] != batch:
        raise ValueError(f"feature_sync: queries must be of batch {batch} as values are, got {list(queries.shape)}")
    if not points_of(width, heads, levels):
        raise ValueError(
            f"feature_sync: the width of queries must be a multiple of heads * (2 + levels) = {heads * (2 + levels)}, "
            f"got {width}"
        )
    if table.shape[-1] != width or table.dtype != queries.dtype:
        raise ValueError(
            f"feature_sync: table must be [R, {width}] in {queries.dtype} as queries are, got {list(table.shape)} in "
            f"{table.dtype}"
        )
    if list(index.shape) not in ([batch, count, pictures], [batch, 1, pictures]):
        raise ValueError(
            f"feature_sync: index must be {[batch, count, pictures]} or {[batch, 1, pictures]}, got {list(index.shape)}"
        )
    if (
        reference_points.shape[0] not in (1, batch)
        or reference_points.shape[1] not in (1, count)
        or reference_points.shape[2] != 2
    ):
        raise ValueError(
            f"feature_sync: reference_points must be [{batch} or 1, {count} or 1, 2], got "
            f"{list(reference_points.shape)}"
        )
    if not base > 0:
        raise ValueError(f"feature_sync: base must be positive, got {base}")
    if ignore is not None and (list(ignore.shape) != [heads * channels] or ignore.dtype != values.dtype):
        raise ValueError(
            f"feature_sync: ignore must be [{heads * channels}] in {values.dtype} as values are, got "
            f"{list(ignore.shape)} in {ignore.dtype}"
        )


def _reference(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> torch.Tensor:
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


FEATURE_SYNC = register(
    Operation(name="feature_sync", check=_check, forms={"reference": _reference}, auto=("reference",))
)
