"""MM-Interleaved's feature synchronizer as a module with the original's parameters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..ops import backend as backends
from ..ops.feature_sync_reference import read_pictures
from ..runtime.layer_dtypes import call, compute_dtype
from ..runtime.weights import why_more_than_weights, why_not_plain
from .packed_feature_synchronizer import PackedFeatureSynchronizer, fold
from .synchronizer_inputs import (
    check_batch,
    check_features,
    check_query,
    check_values,
    index_of_queries,
    read_reference_points,
    relative_index,
    synchronizer_sizes,
)

OWNER = "FeatureSynchronizer"


class FeatureSynchronizer(nn.Module):
    """The multi-modal feature synchronizer (MMFS) of MM-Interleaved with the original's parameters.

    Every query reads a few points of every level of every picture that it sees. The parameters have the original's
    names and shapes, so its tensors load with strict=True. `ignore_token` is frozen, as in the original, and so are the
    last logits of each level in `attention_weights`: nothing depends on them, and their gradient is zero.

    A new module is initialised as the original is: offsets do not depend on the query and are uniform within
    `offset_range`, the ignore token is zero, positions are normal with a standard deviation of 0.02, and values and
    results have Xavier's uniform weights.

    Args:
        d_query, d_value, d_out: widths of queries, of pictures' features and of results.
        inner_dim: width of projected features, all heads together.
        heads: divides inner_dim.
        points: points that each head reads in each level of a picture.
        spatial_shapes: the levels, each a side or a pair (h, w).
        base: offset units in the width and in the height of a level.
        max_images: rows of the table of positions. A query sees at most one picture fewer.
        offset_range: bound of new offsets, in these units; the original has 3 in its language model, 1 in its U-Net.
    """

    def __init__(
        self,
        d_query: int,
        d_value: int,
        d_out: int,
        *,
        inner_dim: int,
        heads: int,
        points: int,
        spatial_shapes: Sequence[int | tuple[int, int]],
        base: int,
        max_images: int,
        offset_range: float = 3.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.sizes = sizes = synchronizer_sizes(
            spatial_shapes,
            d_query=d_query,
            d_value=d_value,
            d_out=d_out,
            inner_dim=inner_dim,
            heads=heads,
            points=points,
            base=base,
            max_images=max_images,
        )
        dd = {"device": device, "dtype": dtype}
        levels = len(sizes.spatial_shapes)
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, sizes.inner, **dd), requires_grad=False)
        self.dynamic_offset_mask = nn.Linear(sizes.query, sizes.query, **dd)
        self.sampling_offsets = nn.Linear(sizes.query, sizes.heads * sizes.points * 2, **dd)
        self.attention_weights = nn.Linear(sizes.query, sizes.heads * levels * (sizes.points + 1), **dd)
        self.value_proj = nn.Linear(sizes.value, sizes.inner, **dd)
        self.output_proj = nn.Linear(sizes.inner, sizes.out, **dd)
        self.query_relpos = nn.Embedding(sizes.max_images, sizes.query, **dd)

        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.uniform_(self.sampling_offsets.bias, -offset_range, offset_range)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        for layer in (self.dynamic_offset_mask, self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.query_relpos.weight, std=0.02)

    def values(self, features: torch.Tensor) -> torch.Tensor:
        """Projected features of pictures, [B, n, S, H, D], which `forward` takes in the place of the features.

        They can be kept for later calls, because they depend on the features alone.

        Args:
            features: [B, n, S, d_value], in the dtype of the weights.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        check_features(OWNER, features, self.sizes, compute_dtype(self.value_proj), features.device)
        return self.value_proj(features).unflatten(-1, (self.sizes.heads, -1))

    def index(self, mask: torch.Tensor) -> torch.Tensor:
        """The relative index of pictures for a mask, [B, n] or [B, Q, n]: int64 of its shape.

        `forward` takes it in the place of the mask.

        Raises:
            ValueError: a row of the mask sees more pictures than the table has positions for.
        """
        return relative_index(OWNER, mask, self.sizes.max_images)

    def forward(
        self,
        query: torch.Tensor,
        features: torch.Tensor | None,
        reference_points: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        values: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """What the queries read: [B, Q, d_out].

        Args:
            query: [B, Q, d_query], in the dtype of the weights.
            features: [B, n, S, d_value], in the dtype of the weights: n pictures, the oldest first, their levels one
                after the other, each row by row. None where `values` are given.
            reference_points: [B or 1, Q or 1, 1, 2], floating point, (x, y) in [0, 1]: where the offsets start.
            mask: [B, Q, n], or [B, n] for all queries alike: 1 (or True) where the query sees the picture; None where
                it sees all. One query takes the last row of a longer mask. With n of `max_images` or more, the host
                waits for the mask; otherwise nothing waits for the device.
            values: [B, n, S, H, D], what the method `values` returned for the features, in their place.
            index: [B, Q, n] or [B, n], what the method `index` returned for the mask, in its place.
            backend: overrides the choice in force. `reference` runs the original's own steps, with its copies of the
                query for every picture. The others project a query once. If `sampling_offsets`, `attention_weights` or
                `query_relpos` is more than a plain layer (adapters, hooks, quantized or parametrized layers), its
                result for the sum of query and position can only be had by calling it for every picture, so every
                backend runs the original's steps. The other layers are called by every backend.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, or a query sees too many pictures; the message names what
                was expected and what came.
            BackendError: a backend was named that cannot run here.
        """
        check_query(OWNER, query, self.sizes.query, compute_dtype(self.dynamic_offset_mask), query.device)
        if (features is None) == (values is None):
            raise ValueError(f"{OWNER}: expected features or values, got {'neither' if values is None else 'both'}")
        if values is None:
            check_features(OWNER, features, self.sizes, compute_dtype(self.value_proj), query.device)
            check_batch(OWNER, query, "features", features)
        else:
            check_values(OWNER, values, self.sizes, compute_dtype(self.value_proj), query.device)
            check_batch(OWNER, query, "values", values)
        points = read_reference_points(OWNER, reference_points, query)
        pictures = (features if values is None else values).shape[1]
        index = index_of_queries(OWNER, query, pictures, self.sizes.max_images, mask, index)
        if values is None:
            values = self.value_proj(features).unflatten(-1, (self.sizes.heads, -1))
        ignore = self.ignore_token.flatten().to(values.dtype)
        if self._projects_each_picture(backend, query.device):
            read = self._original_steps(query, values, index, points, ignore)
        else:
            queries, table = self._project_once(query)
            read = ops.feature_sync(
                values,
                queries,
                table,
                index,
                points,
                self.sizes.spatial_shapes,
                base=self.sizes.base,
                ignore=ignore,
                backend=backend,
            )
        return call(self.output_proj, read)

    def _projects_each_picture(self, backend: str | None, device: torch.device) -> bool:
        if backends.choose("feature_sync", backend, device) == "reference":
            return True
        return any(
            why_not_plain(name, getattr(self, name), known=(kind,), reads=reads)
            for name, kind, reads in (
                ("sampling_offsets", nn.Linear, ("weight", "bias")),
                ("attention_weights", nn.Linear, ("weight", "bias")),
                ("query_relpos", nn.Embedding, ("weight",)),
            )
        )

    def _project_once(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The offsets and logits [B, Q, H * P * 2 + H * L * P] of the queries, and what a picture's position adds."""
        query = self.dynamic_offset_mask(query)
        positions = self.query_relpos.weight
        offsets, logits = self.sampling_offsets, self.attention_weights
        return (
            torch.cat([offsets(query), self._used_logits(logits(query))], dim=-1),
            torch.cat(
                [F.linear(positions, offsets.weight), self._used_logits(F.linear(positions, logits.weight))], dim=-1
            ),
        )

    def _used_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., H * L * P] without the last one of each level."""
        return logits.unflatten(-1, (-1, self.sizes.points + 1))[..., :-1].flatten(-2)

    def _original_steps(self, query, values, index, reference_points, ignore) -> torch.Tensor:
        """The original's steps from the query to the sum that `output_proj` takes.

        Two of its steps are left out, which change no result: it looks for masked rows and writes into the logits of
        their ignore slots, which are overwritten, and it asserts the largest index.
        """
        sizes, (count, pictures) = self.sizes, (query.shape[1], values.shape[1])
        query = self.dynamic_offset_mask(query[:, None].repeat(1, pictures, 1, 1))
        query = query + self.query_relpos(index.transpose(1, 2).expand(-1, -1, count))
        offsets = self.sampling_offsets(query).unflatten(-1, (sizes.heads, sizes.points, 2))
        logits = self.attention_weights(query).unflatten(-1, (sizes.heads, -1, sizes.points + 1))
        return read_pictures(
            values,
            offsets.transpose(1, 2),
            logits.transpose(1, 2),
            index > 0,
            reference_points,
            sizes.spatial_shapes,
            sizes.base,
            ignore,
        )

    def pack(
        self,
        *,
        query_gain: torch.Tensor | None = None,
        query_shift: torch.Tensor | None = None,
        feature_gain: torch.Tensor | None = None,
        feature_shift: torch.Tensor | None = None,
        output_gain: torch.Tensor | float | None = None,
        output_weight: torch.Tensor | None = None,
        output_bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedFeatureSynchronizer:
        """A frozen copy for inference, into which the layers around the module can be folded.

        For queries x and features y, the copy computes

            output_weight (output_gain * module(x * query_gain + query_shift, y * feature_gain + feature_shift))
            + output_bias,

        so gains and shifts are those of the norms before the module, whose normalised results x and y are then passed.
        What is None is left out. All products of weights are made in float64.

        Args:
            query_gain: [d_query].
            query_shift: [d_query], or [Q, d_query] with one row for each query, such as positions; the copy then takes
                exactly Q queries.
            feature_gain, feature_shift: [d_value].
            output_gain: a number, or a tensor [1] or [d_out], such as the tanh of a gate.
            output_weight: [d, d_out] of a Linear, or [d, d_out, 1, 1] of a convolution that follows.
            output_bias: [d], of the same layer.
            dtype: of the copy's tensors; None: the module's.

        Raises:
            ValueError: a layer computes something other than its weights say, or a tensor does not fit; the message
                says what.
        """
        if reason := why_more_than_weights(self, (FeatureSynchronizer, nn.Linear, nn.Embedding), placed=True):
            raise ValueError(f"{OWNER}.pack: {reason}")
        folded = fold(
            self.sizes,
            self.state_dict(),
            query_gain=query_gain,
            query_shift=query_shift,
            feature_gain=feature_gain,
            feature_shift=feature_shift,
            output_gain=output_gain,
            output_weight=output_weight,
            output_bias=output_bias,
        )
        return PackedFeatureSynchronizer(self.sizes, folded, dtype or self.ignore_token.dtype, watched=self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.sizes._asdict().items())
