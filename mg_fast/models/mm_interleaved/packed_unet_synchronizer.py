"""The U-Net's synchronizers, frozen for inference, with everything that does not depend on the step made before."""

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ...modules import FeatureSynchronizer
from ...modules.packed_feature_synchronizer import fold
from ...modules.synchronizer_inputs import check_features, relative_index
from ...runtime.weights import Fingerprint, why_more_than_weights
from .residuals import Residual
from .unet_synchronizer import EPS, UNetSynchronizer, UNetSynchronizerBlock, check_map, pixel_centres

OWNER = "PackedUNetSynchronizer"
# The classes in a UNetSynchronizer whose calls do no more than their weights say.
_PLAIN = frozenset(
    {UNetSynchronizer, nn.ModuleList, UNetSynchronizerBlock, FeatureSynchronizer}
    | {nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv2d}
)


class PackedUNetSynchronizer(nn.Module):
    """A frozen copy of a `UNetSynchronizer` for inference.

    The values of all blocks are made by one product for each picture; both halves of a guided batch and all steps share
    them. Norms, positions and the convolution are folded into the weights, so that a step computes, for every map, a
    norm, a product, the operation `feature_sync`, a product and a sum. Where no row has a previous picture, every map
    gets one constant for each channel, and a step computes nothing but the sum.

    Its tensors are buffers that follow `to` and `half`. The state_dict is empty, because everything follows from the
    weights that it was packed from.

    Args:
        module: what is packed. Later changes of it are not followed; `check_unchanged` finds them.
        dtype: of the packed tensors; None: the module's.

    Raises:
        ValueError: a layer computes something other than its weights say; the message says which.
    """

    def __init__(self, module: UNetSynchronizer, dtype: torch.dtype | None = None):
        super().__init__()
        if reason := why_not_packable(module):
            raise ValueError(f"{OWNER}: {reason}")
        dtype = dtype or module.mmfs_mid_block.conv.weight.dtype
        folded = [_fold(block) for block in module.blocks]
        self.sizes = module.mmfs_mid_block.mmfs.sizes
        self.blocks = nn.ModuleList(
            PackedUNetSynchronizerBlock(block, weights, dtype) for block, weights in zip(module.blocks, folded)
        )
        # One product for all blocks, whose results are contiguous: [blocks, d_value, inner] and [blocks, 1, inner].
        weights, bias = (
            torch.stack([getattr(f, name) for f in folded]).to(dtype) for name in ("value_weight", "value_bias")
        )
        self.register_buffer("value_weight", weights.transpose(1, 2).contiguous(), persistent=False)
        self.register_buffer("value_bias", bias[:, None], persistent=False)
        self._packed = Fingerprint([module])

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a weight of the module was changed in place since it was packed."""
        if self._packed.weights_written():
            raise RuntimeError(f"{OWNER}: the module's weights were changed since it was packed: pack it again")

    @torch.no_grad()
    def prepare(
        self, maps: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `residuals` takes in every step of a picture, without gradients.

        Args:
            maps, mask: as in `UNetSynchronizer.prepare`.

        Returns:
            The values that the blocks read, [blocks, B, n, S, H, D], and the relative index [B, 1, n] of the pictures,
            int64; None for both if there are no maps.

        Raises:
            ValueError: the maps do not fit.
            RuntimeError: the module's weights were changed since they were packed.
        """
        self.check_unchanged()
        if maps is None:
            return None, None
        check_features(OWNER, maps, self.sizes, self.value_weight.dtype, self.value_weight.device)
        if mask is None:
            mask = maps.new_ones(maps.shape[:2])
        rows = F.layer_norm(maps, maps.shape[-1:], eps=EPS).flatten(0, 2)
        values = torch.baddbmm(self.value_bias, rows.expand(len(self.value_weight), -1, -1), self.value_weight)
        values = values.view(len(values), *maps.shape[:3], self.sizes.heads, -1)
        return values, relative_index(OWNER, mask, self.sizes.max_images)[:, None]

    def residuals(
        self,
        values: torch.Tensor | None,
        index: torch.Tensor | None,
        *,
        halves: int = 1,
        backend: str | None = None,
    ) -> list[Residual]:
        """What is added to each map, as `UNetSynchronizer.residuals`, without gradients.

        Args:
            values, index: from `prepare`.
            halves, backend: as there.
        """
        if values is None:
            return [Residual(block.without_pictures) for block in self.blocks]

        def of(block: PackedUNetSynchronizerBlock, own: torch.Tensor) -> Residual:
            return Residual(lambda skip: block(skip, own, index, halves=halves, backend=backend))

        return [of(block, own) for block, own in zip(self.blocks, values)]


def why_not_packable(module: UNetSynchronizer) -> str | None:
    """Why the module computes something other than its weights say, as a sentence; None where it can be packed."""
    return why_more_than_weights(module, _PLAIN, placed=True)


def _fold(block: UNetSynchronizerBlock):
    """The weights of a block's synchronizer, with those of its norms and its convolution, and its positions."""
    return fold(
        block.mmfs.sizes,
        block.mmfs.state_dict(),
        query_gain=block.query_norm.weight,
        query_shift=block.query_norm.bias.double() + block.positions().double(),
        feature_gain=block.feat_norm.weight,
        feature_shift=block.feat_norm.bias,
        output_gain=None,
        output_weight=block.conv.weight,
        output_bias=block.conv.bias,
    )


class PackedUNetSynchronizerBlock(nn.Module):
    """One block of a `PackedUNetSynchronizer`: the residual of one map of the U-Net."""

    def __init__(self, block: UNetSynchronizerBlock, folded, dtype: torch.dtype):
        super().__init__()
        self.sizes, self.width, self.side = block.mmfs.sizes, block.width, block.side
        for name in ("query_weight", "query_bias", "table", "ignore", "output_weight", "output_bias"):
            self.register_buffer(name, getattr(folded, name).to(dtype, copy=True).contiguous(), persistent=False)
        self.register_buffer("constant", folded.without_pictures.to(dtype, copy=True)[:, None, None], persistent=False)

    def without_pictures(self, skip: torch.Tensor) -> torch.Tensor:
        """The residual [width, 1, 1] of every map whose row has no picture."""
        check_map(skip, self.width, self.side)
        return self.constant

    @torch.no_grad()
    def forward(
        self,
        skip: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor,
        *,
        halves: int = 1,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The residual [B * halves, width, side, side] of a map of the same shape.

        Args:
            skip: the map, in the dtype of the packed tensors. The rows that share a picture are next to each other.
            values: [B, n, S, H, D].
            index: [B, 1, n].
            halves: rows of the map for each row of values.
            backend: overrides the choice in force.
        """
        check_map(skip, self.width, self.side)
        rows = F.layer_norm(skip.flatten(2).transpose(1, 2), (self.width,), eps=EPS)
        z = F.linear(rows, self.query_weight).add_(self.query_bias)
        # The rows that share a picture become further queries of one row, so that its values are not repeated.
        shared = z.reshape(len(values), -1, z.shape[-1])
        read = ops.feature_sync(
            values,
            shared,
            self.table,
            index,
            pixel_centres(self.side, skip.device, halves)[:, :, 0],
            self.sizes.spatial_shapes,
            base=self.sizes.base,
            ignore=self.ignore,
            backend=backend,
        )
        out = F.linear(read.view(len(skip), -1, read.shape[-1]), self.output_weight, self.output_bias)
        return out.transpose(1, 2).unflatten(2, (self.side, self.side))
