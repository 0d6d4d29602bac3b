"""The sizes of a feature synchronizer, the checks of its inputs, and the relative index of pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import quoted
from ..runtime.arguments import whole_number
from ..runtime.layer_dtypes import autocasting


class SynchronizerSizes(NamedTuple):
    """The whole numbers that a synchronizer is built with.

    Attributes:
        query, value, out: widths of queries, of pictures' features and of results.
        inner: width of projected features, all heads together.
        heads, points: heads, and points that a head reads in each level of a picture.
        spatial_shapes: (h, w) of every level.
        base: offset units in the width and in the height of a level.
        max_images: rows of the table of positions; row 0 is for pictures that are not seen.
    """

    query: int
    value: int
    out: int
    inner: int
    heads: int
    points: int
    spatial_shapes: tuple[tuple[int, int], ...]
    base: int
    max_images: int

    @property
    def pixels(self) -> int:
        """Pixels S of a picture, all levels together."""
        return sum(h * w for h, w in self.spatial_shapes)


def synchronizer_sizes(spatial_shapes: Sequence[int | tuple[int, int]], **numbers: int) -> SynchronizerSizes:
    """The sizes as plain numbers, from the arguments of FeatureSynchronizer; a level may be given by its side alone.

    Raises:
        ValueError: a number is not a positive whole number, the inner width cannot be divided among the heads, or the
            levels are not sides or pairs (h, w).
    """
    plain = {name: whole_number(value) or 0 for name, value in numbers.items()}
    for name, number in plain.items():
        if number <= 0:
            raise ValueError(
                f"FeatureSynchronizer: {name} must be a positive whole number, got {quoted(numbers[name])}"
            )
    if plain["inner_dim"] % plain["heads"]:
        raise ValueError(
            f"FeatureSynchronizer: inner_dim must be a multiple of heads, got inner_dim={plain['inner_dim']} and "
            f"heads={plain['heads']}"
        )
    listed = isinstance(spatial_shapes, Sequence) and not isinstance(spatial_shapes, str)
    levels = [_level(level) for level in spatial_shapes] if listed else []
    if not levels or None in levels:
        raise ValueError(
            "FeatureSynchronizer: spatial_shapes must be a list of at least one side or pair (h, w) of positive whole "
            f"numbers, got {quoted(spatial_shapes)}"
        )
    return SynchronizerSizes(
        query=plain["d_query"],
        value=plain["d_value"],
        out=plain["d_out"],
        inner=plain["inner_dim"],
        heads=plain["heads"],
        points=plain["points"],
        spatial_shapes=tuple(levels),
        base=plain["base"],
        max_images=plain["max_images"],
    )


def _level(level) -> tuple[int, int] | None:
    """A level as (h, w); None if it is neither a side nor a pair."""
    if (side := whole_number(level)) is not None:
        pair = (side, side)
    elif isinstance(level, Sequence) and not isinstance(level, str) and len(level) == 2:
        pair = tuple(whole_number(side) or 0 for side in level)
    else:
        return None
    return pair if min(pair) > 0 else None


def check_query(owner: str, query: torch.Tensor, width: int, dtype: torch.dtype | None, device: torch.device) -> None:
    """Raises ValueError unless a query is [B, Q, width], in this dtype (None: any) and on this device."""
    if query.dim() != 3 or query.shape[-1] != width:
        raise ValueError(f"{owner}: query must be [B, Q, {width}], got {list(query.shape)}")
    _check_kind(owner, "query", query, dtype, device)


def check_features(
    owner: str, features: torch.Tensor, sizes: SynchronizerSizes, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raises ValueError unless features are [B, n, S, d_value], in this dtype (None: any) and on this device."""
    if features.dim() != 4 or features.shape[-1] != sizes.value:
        raise ValueError(f"{owner}: features must be [B, n, {sizes.pixels}, {sizes.value}], got {list(features.shape)}")
    if features.shape[2] != sizes.pixels:
        raise ValueError(
            f"{owner}: the levels {quoted(list(sizes.spatial_shapes))} have {sizes.pixels} pixels, but a picture's "
            f"features have {features.shape[2]}: {list(features.shape)}"
        )
    _check_kind(owner, "features", features, dtype, device)


def check_values(
    owner: str, values: torch.Tensor, sizes: SynchronizerSizes, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raises ValueError unless projected features are [B, n, S, H, D], in this dtype (None: any), on this device."""
    expected = [sizes.pixels, sizes.heads, sizes.inner // sizes.heads]
    if values.dim() != 5 or list(values.shape[2:]) != expected:
        raise ValueError(
            f"{owner}: values must be [B, n, {', '.join(map(str, expected))}], as values() returns them, got "
            f"{list(values.shape)}"
        )
    _check_kind(owner, "values", values, dtype, device)


def check_batch(owner: str, query: torch.Tensor, name: str, pictures: torch.Tensor) -> None:
    """Raises ValueError unless the features or values of the pictures are of the query's batch."""
    if pictures.shape[0] != query.shape[0]:
        raise ValueError(
            f"{owner}: {name} must be of batch {query.shape[0]} as query is, got {list(pictures.shape)}; "
            "expand serves rows that share pictures"
        )


def read_reference_points(owner: str, points: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Reference points [B or 1, Q or 1, 1, 2] without their level axis.

    Raises:
        ValueError: they are of another shape, such as boxes of four numbers, not floating point, or elsewhere.
    """
    batch, count = query.shape[:2]
    if points.dim() == 4 and points.shape[-1] == 4:
        raise ValueError(
            f"{owner}: reference_points must be points (x, y), got boxes of four numbers: {list(points.shape)}; boxes "
            "are not supported"
        )
    if (
        points.dim() != 4
        or points.shape[0] not in (1, batch)
        or points.shape[1] not in (1, count)
        or list(points.shape[2:]) != [1, 2]
    ):
        raise ValueError(
            f"{owner}: reference_points must be [{batch} or 1, {count} or 1, 1, 2], with one point for all levels, got "
            f"{list(points.shape)}"
        )
    _check_kind(owner, "reference_points", points, None, query.device)
    return points[:, :, 0]


def _check_kind(owner, name: str, tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{owner}: {name} must be floating point, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{owner}: {name} must be on {device}, got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype and not autocasting(tensor):
        raise ValueError(f"{owner}: {name} must be {dtype} as the weights are, got {tensor.dtype}")


def rows_of_queries(
    owner: str, name: str, rows: torch.Tensor, batch: int, count: int, pictures: int, device: torch.device
) -> torch.Tensor:
    """The rows of a mask or of an index that belong to the queries: [B, Q, n] or [B, 1, n].

    One query takes the last row, because it is the newest token of a prompt as long as the mask.

    Args:
        name: what the message calls it.
        rows: [B, n] for all queries alike, [B, Q, n], or with one query [B, any, n].

    Raises:
        ValueError: it is of another shape, or on another device than the pictures.
    """
    if rows.device != device:
        raise ValueError(f"{owner}: {name} must be on {device} as the pictures are, got {rows.device}")
    given, rows = rows.shape, rows[:, None] if rows.dim() == 2 else rows
    if (
        rows.dim() != 3
        or (rows.shape[0], rows.shape[2]) != (batch, pictures)
        or (rows.shape[1] not in (1, count) and (count != 1 or rows.shape[1] == 0))
    ):
        expected = f"[{batch}, {count}, {pictures}]" if count != 1 else f"[{batch}, 1 or more, {pictures}]"
        raise ValueError(f"{owner}: {name} must be {expected} or [{batch}, {pictures}], got {list(given)}")
    return rows[:, -1:] if count == 1 else rows


def relative_index(owner: str, mask: torch.Tensor, max_images: int) -> torch.Tensor:
    """The relative index of every picture, int64 of the mask's shape: 1 for the most recent one that a row sees.

    Older ones have 2, 3 and so on; a picture that the row does not see has 0.

    Args:
        mask: [..., n], bool, integer or floating point: a picture is seen where it is not 0.
        max_images: rows of the table of positions. With fewer pictures nothing has to be checked. Otherwise the largest
            index is read, for which the host waits for the device; a trace cannot hold that.

    Raises:
        ValueError: a row sees more pictures than the table has positions for.
    """
    seen = mask != 0
    order = seen.cumsum(-1)
    if mask.shape[-1] < max_images or mask.is_meta:
        return (order[..., -1:] + 1 - order) * seen
    if order.numel() and (most := int(order[..., -1].max())) >= max_images:
        raise ValueError(
            f"{owner}: a query may see at most {max_images - 1} pictures, because the table of positions has "
            f"{max_images} rows, the first for pictures that are not seen; a row of the mask sees {most}"
        )
    return (order[..., -1:] + 1 - order) * seen


def index_of_all(owner: str, pictures: int, max_images: int, batch: int, device: torch.device) -> torch.Tensor:
    """The relative index [B, 1, n] where every query sees every picture.

    Raises:
        ValueError: there are more pictures than the table has positions for.
    """
    if pictures >= max_images:
        raise ValueError(
            f"{owner}: a query may see at most {max_images - 1} pictures, because the table of positions has "
            f"{max_images} rows, the first for pictures that are not seen; without a mask it sees all {pictures}"
        )
    return torch.arange(pictures, 0, -1, device=device).expand(batch, 1, pictures)


def index_of_queries(
    owner: str,
    query: torch.Tensor,
    pictures: int,
    max_images: int,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """The relative index int64 [B, Q, n] or [B, 1, n] that a call takes from its mask or from its index.

    Args:
        query: [B, Q, d_query].
        pictures: n.
        mask, index: of the call; at most one of them is given. Without both, every query sees every picture.

    Raises:
        ValueError: both are given, one does not fit, or a query sees too many pictures.
    """
    batch, count, device = *query.shape[:2], query.device
    if index is None and mask is None:
        return index_of_all(owner, pictures, max_images, batch, device)
    if index is None:
        return relative_index(owner, rows_of_queries(owner, "mask", mask, batch, count, pictures, device), max_images)
    if mask is not None:
        raise ValueError(f"{owner}: expected a mask or an index, got both")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{owner}: index must be torch.int64, as index() returns it, got {index.dtype}")
    return rows_of_queries(owner, "index", index, batch, count, pictures, device)
