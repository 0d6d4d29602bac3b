"""The frozen form of the feature synchronizer for inference, and the products of weights that it is made of."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..runtime.weights import Fingerprint
from .synchronizer_inputs import (
    SynchronizerSizes,
    check_batch,
    check_features,
    check_query,
    check_values,
    index_of_queries,
    read_reference_points,
    relative_index,
)

OWNER = "PackedFeatureSynchronizer"


class FoldedWeights(NamedTuple):
    """The tensors of a packed synchronizer, Z = H * P * 2 + H * L * P offsets and logits wide.

    Attributes:
        query_weight: [Z, d_query].
        query_bias: [Z], or [Q, Z] with one row for each query.
        table: [max_images, Z], what the position of a picture adds.
        value_weight: [inner, d_value].
        value_bias, ignore: [inner].
        output_weight: [d_out, inner].
        output_bias, without_pictures: [d_out]; the latter is the result of a query that sees no picture.
    """

    query_weight: torch.Tensor
    query_bias: torch.Tensor
    table: torch.Tensor
    value_weight: torch.Tensor
    value_bias: torch.Tensor
    ignore: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    without_pictures: torch.Tensor


def fold(
    sizes: SynchronizerSizes,
    state: Mapping[str, torch.Tensor],
    *,
    query_gain: torch.Tensor | None,
    query_shift: torch.Tensor | None,
    feature_gain: torch.Tensor | None,
    feature_shift: torch.Tensor | None,
    output_gain: torch.Tensor | float | None,
    output_weight: torch.Tensor | None,
    output_bias: torch.Tensor | None,
) -> FoldedWeights:
    """The products of a synchronizer's weights with each other and with those of the layers around it, in float64.

    Offsets and logits are W_z x + b_z + T[r] with W_z = [W_o; W_a] W_m and T = [W_o; W_a] R, because no step between
    the layers is nonlinear. The unused logits of W_a are left out.

    Args:
        sizes: of the synchronizer.
        state: its state_dict.

    The others are those of `FeatureSynchronizer.pack`.

    Raises:
        ValueError: a tensor of the layers around it does not fit.
    """
    device = state["ignore_token"].device

    def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"{name}.weight"].double(), state[f"{name}.bias"].double()

    def option(name: str, tensor: torch.Tensor | float | None, *shapes: tuple) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = torch.as_tensor(tensor).detach()
        # None stands for any number of rows.
        fits = any(
            len(shape) == tensor.dim() and all(n is None or n == m for n, m in zip(shape, tensor.shape))
            for shape in shapes
        )
        if not fits or tensor.is_complex() or tensor.dtype == torch.bool:
            expected = " or ".join("[" + ", ".join("any" if n is None else str(n) for n in s) + "]" for s in shapes)
            raise ValueError(
                f"FeatureSynchronizer.pack: {name} must be {expected}, got {list(tensor.shape)} in {tensor.dtype}"
            )
        return tensor.to(device, torch.float64)

    (mask, mask_bias), (values, value_bias), (out, out_bias) = map(
        weights, ("dynamic_offset_mask", "value_proj", "output_proj")
    )
    (offsets, offset_bias), (logits, logit_bias) = map(weights, ("sampling_offsets", "attention_weights"))

    def used(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (-1, sizes.points + 1))[:, :-1].flatten(0, 1)

    both, bias = torch.cat([offsets, used(logits)]), torch.cat([offset_bias, used(logit_bias)])
    queries, bias = both @ mask, bias + both @ mask_bias
    table = state["query_relpos.weight"].double() @ both.T
    if (shift := option("query_shift", query_shift, (sizes.query,), (None, sizes.query))) is not None:
        bias = shift @ queries.T + bias
    if (gain := option("query_gain", query_gain, (sizes.query,))) is not None:
        queries = queries * gain
    if (shift := option("feature_shift", feature_shift, (sizes.value,))) is not None:
        value_bias = value_bias + values @ shift
    if (gain := option("feature_gain", feature_gain, (sizes.value,))) is not None:
        values = values * gain
    if (gain := option("output_gain", output_gain, (), (1,), (sizes.out,))) is not None:
        out, out_bias = out * gain[..., None], out_bias * gain
    following = option("output_weight", output_weight, (None, sizes.out), (None, sizes.out, 1, 1))
    if following is not None:
        following = following.flatten(1)
        out, out_bias = following @ out, following @ out_bias
    if (shift := option("output_bias", output_bias, (len(out),))) is not None:
        out_bias = out_bias + shift
    ignore = state["ignore_token"].double().flatten()
    return FoldedWeights(
        query_weight=queries,
        query_bias=bias,
        table=table,
        value_weight=values,
        value_bias=value_bias,
        ignore=ignore,
        output_weight=out,
        output_bias=out_bias,
        without_pictures=out @ ignore + out_bias,
    )


class PackedFeatureSynchronizer(nn.Module):
    """A frozen feature synchronizer for inference; `FeatureSynchronizer.pack` makes one.

    Pictures are projected once by `values` and kept; a call then costs one small product for the queries and one for
    the result. Its tensors are buffers that follow `to` and `half`. The state_dict is empty, because everything follows
    from the weights that it was packed from.

    Nothing is shared with the module that was packed. Where that module still exists, a call raises an error once any
    of its weights was changed in place. Writes through `.data` do not count as changes.

    Attributes:
        sizes: of the synchronizer.
        without_pictures: [d_out], the result of every query that sees no picture.
    """

    def __init__(self, sizes: SynchronizerSizes, folded: FoldedWeights, dtype: torch.dtype, watched: nn.Module):
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"FeatureSynchronizer.pack: dtype must be floating point, got {dtype}")
        self.sizes = sizes
        for name, tensor in folded._asdict().items():
            self.register_buffer(name, tensor.to(dtype, copy=True).contiguous(), persistent=False)
        self._packed = Fingerprint([watched])

    @torch.no_grad()
    def values(self, features: torch.Tensor) -> torch.Tensor:
        """What a call reads of pictures: features [B, n, S, d_value] -> [B, n, S, H, D], without gradients.

        Pictures may be projected one by one and concatenated.

        Raises:
            ValueError: the features do not fit.
            RuntimeError: the module's weights were changed since they were packed.
        """
        self.check_unchanged()
        check_features(OWNER, features, self.sizes, self.value_weight.dtype, self.value_weight.device)
        return F.linear(features, self.value_weight, self.value_bias).unflatten(-1, (self.sizes.heads, -1))

    def index(self, mask: torch.Tensor) -> torch.Tensor:
        """The relative index of pictures for a mask, [B, n] or [B, Q, n]: int64 of its shape.

        It can be passed in place of the mask, for instance in all steps of a generation, in which it does not change.

        Raises:
            ValueError: a row of the mask sees more pictures than the table has positions for.
        """
        return relative_index(OWNER, mask, self.sizes.max_images)

    @torch.no_grad()
    def forward(
        self,
        query: torch.Tensor,
        values: torch.Tensor,
        reference_points: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        index: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """What the queries read, [B, Q, d_out], without gradients.

        Args:
            query: [B, Q, d_query], in the dtype of the packed tensors.
            values: [B, n, S, H, D], from `values`.
            reference_points: [B or 1, Q or 1, 1, 2], as in `FeatureSynchronizer`.
            mask: [B, Q, n] or [B, n], as in `FeatureSynchronizer`.
            index: what `index` returned for the mask, in its place.
            backend: overrides the choice in force.

        Raises:
            ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
            BackendError: a backend was named that cannot run here.
            RuntimeError: the module's weights were changed since they were packed.
        """
        self.check_unchanged()
        dtype, device = self.query_weight.dtype, self.query_weight.device
        check_query(OWNER, query, self.sizes.query, dtype, device)
        check_values(OWNER, values, self.sizes, dtype, device)
        check_batch(OWNER, query, "values", values)
        points = read_reference_points(OWNER, reference_points, query)
        index = index_of_queries(OWNER, query, values.shape[1], self.sizes.max_images, mask, index)
        z = self._project(query)
        if values.shape[1] == 0:
            # Autocast has chosen the dtype of the products, here too.
            return self.without_pictures.to(z.dtype).repeat(*query.shape[:2], 1)
        read = ops.feature_sync(
            values,
            z,
            # Autocast has chosen the dtype of the products.
            self.table.to(z.dtype),
            index,
            points,
            self.sizes.spatial_shapes,
            base=self.sizes.base,
            ignore=self.ignore.to(values.dtype),
            backend=backend,
        )
        return F.linear(read, self.output_weight, self.output_bias)

    def _project(self, query: torch.Tensor) -> torch.Tensor:
        """Offsets and logits of the queries, [B, Q, Z]."""
        if self.query_bias.dim() == 1:
            return F.linear(query, self.query_weight, self.query_bias)
        if query.shape[1] != len(self.query_bias):
            raise ValueError(
                f"{OWNER}: expected {len(self.query_bias)} queries, because as many rows of query_shift were packed, "
                f"got {query.shape[1]}"
            )
        return F.linear(query, self.query_weight).add_(self.query_bias)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the weights of the packed module were changed; nothing is checked in a trace."""
        if not torch.compiler.is_compiling() and self._packed.weights_written():
            raise RuntimeError(f"{OWNER}: the module's weights were changed since it was packed: pack it again")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.sizes._asdict().items())
