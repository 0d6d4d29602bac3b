"""Multi-scale deformable attention: every query reads a few points of several maps, with weights of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import quoted
from ..runtime.arguments import whole_number
from . import backend as backends
from .operation import Operation, register

__all__ = ["deformable_attention"]


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The weighted sum of bilinear samples of several maps, as Deformable DETR defines it (arXiv 2010.04159).

    A location (x, y) lies at the pixel coordinates (x * w - 0.5, y * h - 0.5) of a map of h x w pixels. Pixels outside
    of the map are zero, so a sample far outside contributes nothing. A location that is not finite contributes nothing
    either. NaN in values or weights stays visible.

    Args:
        value: [B, S, H, D], floating point: the maps of all levels one after the other, each row by row; H heads of D
            channels. Any strides; fastest with unit channel stride.
        spatial_shapes: (h, w) of every level, whole numbers on the host. S is the sum of h * w.
        sampling_locations: [B, Q, H, L, P, 2], floating point, (x, y) in [0, 1] of the level's map. They are read in
            float32 whatever the dtype of `value`, so float32 locations lose nothing beside 16-bit values.
        attention_weights: [B, Q, H, L, P], floating point. They need not sum to one.
        backend: overrides the choice in force.

    Returns:
        [B, Q, H * D] in value's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.
    """
    arguments = value, spatial_shapes, sampling_locations, attention_weights
    form = backends.choose_form(DEFORMABLE_ATTENTION, backend, value.device, *arguments)
    return form(value, [(int(h), int(w)) for h, w in spatial_shapes], sampling_locations, attention_weights)


def _check(value, spatial_shapes, sampling_locations, attention_weights) -> None:
    for name, tensor, layout in (
        ("value", value, "[B, S, H, D]"),
        ("sampling_locations", sampling_locations, "[B, Q, H, L, P, 2]"),
        ("attention_weights", attention_weights, "[B, Q, H, L, P]"),
    ):
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"deformable_attention: {name} must be {layout}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"deformable_attention: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"deformable_attention: {name} must be on {value.device} as value is, got {tensor.device}")
    check_spatial_shapes("deformable_attention", spatial_shapes, value.shape[1])
    batch, _, heads, _ = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    expected = [batch, queries, heads, len(spatial_shapes), points]
    if list(sampling_locations.shape) != [*expected, 2]:
        raise ValueError(
            f"deformable_attention: sampling_locations must be [B, Q, H, L, P, 2] = {[*expected, 2]} for value "
            f"{list(value.shape)} and {len(spatial_shapes)} levels, got {list(sampling_locations.shape)}"
        )
    if list(attention_weights.shape) != expected:
        raise ValueError(
            f"deformable_attention: attention_weights must be [B, Q, H, L, P] = {expected} as sampling_locations are, "
            f"got {list(attention_weights.shape)}"
        )


def check_spatial_shapes(operation: str, spatial_shapes: Sequence[tuple[int, int]], pixels: int) -> None:
    """Raises ValueError unless the sizes are pairs of positive whole numbers on the host that add up to `pixels`."""
    if isinstance(spatial_shapes, torch.Tensor):
        raise ValueError(
            f"{operation}: spatial_shapes must be a list of (h, w) on the host, got a tensor on "
            f"{spatial_shapes.device}: pass spatial_shapes.tolist() once, outside of the loop that calls this"
        )
    for size in spatial_shapes:
        if len(size) != 2 or not all((whole_number(side) or 0) > 0 for side in size):
            raise ValueError(
                f"{operation}: spatial_shapes must be pairs (h, w) of positive numbers, got {quoted(size)}"
            )
    expected = sum(int(h) * int(w) for h, w in spatial_shapes)
    if not spatial_shapes or expected != pixels:
        raise ValueError(
            f"{operation}: the levels {quoted(list(spatial_shapes))} have {expected} pixels, but value has {pixels}"
        )


def reference(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """The steps of `ms_deform_attn_core_pytorch` of Deformable DETR, and of transformers: grid_sample for each level.

    The original casts locations to the dtype of values, because grid_sample takes one dtype. Its CUDA kernel leaves out
    locations that are not finite. grid_sample does not promise that, so they are moved outside of the map here.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = (sampling_locations.shape[i] for i in (1, 3, 4))
    finite = sampling_locations.isfinite().all(-1, keepdim=True)
    grids = (2 * sampling_locations.where(finite, -2.0) - 1).to(value.dtype)
    samples = []
    for level, (map, (h, w)) in enumerate(zip(value.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes)):
        map = map.flatten(2).transpose(1, 2).reshape(batch * heads, channels, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.to(value.dtype).transpose(1, 2)
    weights = weights.reshape(batch * heads, 1, queries, levels * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1).view(batch, heads * channels, queries)
    return out.transpose(1, 2).contiguous()


DEFORMABLE_ATTENTION = register(
    Operation(name="deformable_attention", check=_check, forms={"reference": reference}, auto=("reference",))
)
