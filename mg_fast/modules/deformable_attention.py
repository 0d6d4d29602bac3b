"""Multi-scale deformable attention as a module with the parameters of Deformable DETR's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import Proxy

from .. import ops
from ..errors import quoted
from ..ops.spatial_shapes import check_spatial_shapes
from ..runtime.arguments import whole_number
from ..runtime.device_tables import cached_on_device
from ..runtime.layer_dtypes import call
from ..runtime.recording import record_call, recorded_as


class Parts(NamedTuple):
    """What an attention consists of: four layers that are called as they are, and how the points are divided up."""

    sampling_offsets: nn.Module
    attention_weights: nn.Module
    value_proj: nn.Module
    output_proj: nn.Module
    heads: int
    levels: int
    points: int


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159) with the parameter names of Deformable DETR's module.

    They are `sampling_offsets`, `attention_weights`, `value_proj` and `output_proj`, each a Linear, so the tensors of
    the original, of MM-Interleaved's adapter and of transformers' detectors load with strict=True.

    Args:
        d_model: width of queries, features and result.
        levels: number of maps.
        heads: number of heads.
        points: points that a head reads in each map.
        inner_dim: width of the values of all heads together, d_model if it is None. MM-Interleaved's adapter has half
            of d_model here (its `ratio` of 0.5).

    Raises:
        ValueError: a size is not a positive whole number, or inner_dim is not a multiple of heads.
    """

    def __init__(
        self,
        d_model: int,
        *,
        levels: int = 4,
        heads: int = 8,
        points: int = 4,
        inner_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        inner_dim = d_model if inner_dim is None else inner_dim
        sizes = {"d_model": d_model, "levels": levels, "heads": heads, "points": points, "inner_dim": inner_dim}
        for name, size in sizes.items():
            if (whole_number(size) or 0) < 1:
                raise ValueError(f"DeformableAttention: {name} must be a positive whole number, got {quoted(size)}")
        if inner_dim % heads:
            raise ValueError(
                f"DeformableAttention: the width of the values must be a multiple of the {heads} heads, got {inner_dim}"
            )
        self.d_model, self.levels, self.heads, self.points, self.inner_dim = d_model, levels, heads, points, inner_dim
        dd = {"device": device, "dtype": dtype}
        self.sampling_offsets = nn.Linear(d_model, heads * levels * points * 2, **dd)
        self.attention_weights = nn.Linear(d_model, heads * levels * points, **dd)
        self.value_proj = nn.Linear(d_model, inner_dim, **dd)
        self.output_proj = nn.Linear(inner_dim, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as Deformable DETR does.

        At first the points of a head lie in a direction of its own, point i at a distance of i + 1 pixels, and all
        points count alike.
        """
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        angles = torch.arange(self.heads, dtype=torch.float32, device="cpu") * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32, device="cpu")
        ring = (directions[:, None, None] * distances[:, None]).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.reshape(-1))

    def _recorded(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        features: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: torch.Tensor | None = None,
        backend: str | None = None,
    ):
        arguments = query, reference_points, features, spatial_shapes
        if isinstance(query, Proxy):
            return record_call(self, *arguments, padding_mask=padding_mask, backend=backend)
        # A trace holds only for the sizes that it was made with. The reference's steps are the same on every device.
        forward = DeformableAttention.forward.unrecorded
        return forward(self, *arguments, padding_mask=padding_mask, backend="reference")

    @recorded_as(_recorded)
    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        features: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        padding_mask: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The attention of every query to a few points around its reference point in each map.

        The points' locations are computed in float32 if the module has 16 bits. The `reference` backend then rounds
        them to 16 bits, as the original does; the other backends do not.

        Args:
            query: [B, Q, d_model], floating point; cast to the dtype of the layers.
            reference_points: [B or 1, Q, L or 1, 2], (x, y) in [0, 1], around which the offsets are in pixels of the
                map; or [B or 1, Q, L or 1, 4], boxes (x, y, w, h), around whose centre the offsets are in half widths
                and heights divided by the number of points.
            features: [B, S, d_model], the maps one after the other, each row by row.
            spatial_shapes: (h, w) of every map, on the host; S is the sum of h * w.
            padding_mask: [B, S], bool, True where a pixel is padding: its value is then zero.
            backend: overrides the choice in force.

        Returns:
            [B, Q, d_model].

        Raises:
            ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
            BackendError: a backend was named that cannot run here.
        """
        self._check(query, reference_points, features, spatial_shapes, padding_mask)
        parts = Parts(
            self.sampling_offsets,
            self.attention_weights,
            self.value_proj,
            self.output_proj,
            self.heads,
            self.levels,
            self.points,
        )
        return attend(parts, query, reference_points, features, spatial_shapes, padding_mask, backend)[0]

    def _check(self, query, reference_points, features, spatial_shapes, padding_mask) -> None:
        self._fits("query", query, [None, None, [self.d_model]], query.device)
        batch, queries, _ = query.shape
        self._fits("features", features, [[batch], None, [self.d_model]], query.device)
        expected = [[batch, 1], [queries], [self.levels, 1], [2, 4]]
        self._fits("reference_points", reference_points, expected, query.device)
        if padding_mask is not None:
            self._fits("padding_mask", padding_mask, [[batch], [features.shape[1]]], query.device, torch.bool)
        check_spatial_shapes("DeformableAttention", spatial_shapes, features.shape[1])
        if len(spatial_shapes) != self.levels:
            found = quoted(list(spatial_shapes))
            raise ValueError(f"DeformableAttention: spatial_shapes must have {self.levels} levels, got {found}")

    @staticmethod
    def _fits(name: str, tensor: torch.Tensor, expected: list, device: torch.device, dtype=None) -> None:
        """Raises ValueError unless each size is one of the `expected` ones of its dimension; None allows any size."""
        if tensor.device != device:
            raise ValueError(f"DeformableAttention: {name} must be on {device} as query is, got {tensor.device}")
        if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
            wanted = "floating point" if dtype is None else f"of {dtype}"
            raise ValueError(f"DeformableAttention: {name} must be {wanted}, got {tensor.dtype}")
        sizes = zip(tensor.shape, expected)
        if tensor.dim() != len(expected) or any(allowed and size not in allowed for size, allowed in sizes):
            wanted = ", ".join(" or ".join(map(str, dict.fromkeys(allowed or ["any"]))) for allowed in expected)
            raise ValueError(f"DeformableAttention: {name} must be [{wanted}], got {list(tensor.shape)}")

    def __prepare_scriptable__(self):
        # torch.jit.script asks every module what to read in its place.
        raise TypeError(
            "torch.jit.script cannot read DeformableAttention, whose steps depend on sizes: use torch.jit.trace or "
            "torch.export"
        )

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, levels={self.levels}, heads={self.heads}, points={self.points}"
        return sizes if self.inner_dim == self.d_model else f"{sizes}, inner_dim={self.inner_dim}"


def attend(
    parts: Parts,
    query: torch.Tensor,
    reference_points: torch.Tensor,
    features: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    padding_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of `DeformableAttention.forward` with layers that may belong to another module.

    The layers are called, so hooks and adapters on them work. Only the operation checks its inputs.

    Args:
        parts: the layers, and the numbers of heads, levels and points.
        query, reference_points, features, spatial_shapes, padding_mask, backend: as in `DeformableAttention.forward`.

    Returns:
        [B, Q, d], d being the width that parts.output_proj gives, and the weights of the points, [B, Q, H, L, P].
    """
    divided = *query.shape[:2], parts.heads, parts.levels, parts.points
    value = call(parts.value_proj, features)
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0.0)
    offsets = call(parts.sampling_offsets, query).reshape(*divided, 2)
    weights = (
        call(parts.attention_weights, query)
        .reshape(*divided[:3], parts.levels * parts.points)
        .softmax(-1)
        .view(divided)
    )
    locations = sampling_locations(reference_points, offsets, spatial_shapes)
    value = value.reshape(*value.shape[:2], parts.heads, value.shape[-1] // parts.heads)
    out = ops.deformable_attention(value, spatial_shapes, locations, weights, backend=backend)
    return call(parts.output_proj, out), weights


def sampling_locations(
    reference_points: torch.Tensor, offsets: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The locations of all points as fractions of their map, in float32, or in float64 if an input has that.

    Args:
        reference_points: [B or 1, Q, L or 1, 2 or 4], as in `DeformableAttention.forward`.
        offsets: [B, Q, H, L, P, 2], (x, y).
        spatial_shapes: (h, w) of every map.

    Returns:
        [B, Q, H, L, P, 2].

    Raises:
        ValueError: a reference point has neither two nor four numbers, or there are more or fewer sizes than levels.
    """
    if len(spatial_shapes) != (levels := offsets.shape[3]):
        sizes = quoted(list(spatial_shapes))
        raise ValueError(f"deformable attention: expected the sizes of {levels} levels, got {sizes}")
    if reference_points.shape[-1] not in (2, 4):
        found = list(reference_points.shape)
        raise ValueError(f"deformable attention: reference points must be (x, y) or (x, y, w, h), got {found}")
    dtype = torch.promote_types(torch.promote_types(reference_points.dtype, offsets.dtype), torch.float32)
    reference, offsets = reference_points[:, :, None, :, None].to(dtype), offsets.to(dtype)
    if reference.shape[-1] == 4:
        return reference[..., :2] + offsets / offsets.shape[-2] * reference[..., 2:] * 0.5
    sizes = _widths_and_heights(tuple((int(h), int(w)) for h, w in spatial_shapes), offsets.device)
    return reference + offsets / sizes.to(dtype)


@cached_on_device(limit=2**20)
def _widths_and_heights(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """(w, h) of every map: [L, 1, 2] in float32."""
    return torch.tensor([[[w, h]] for h, w in spatial_shapes], dtype=torch.float32, device=device)
