"""The synchronizer's blocks in MM-Interleaved's diffusion decoder: the original's steps, and their packed form."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mg_fast.modules import FeatureSynchronizer, PackedFeatureSynchronizer

from ..costs.sampling import SyncSizes

EPS = 1e-6
# Positions along a side of the table that every block has.
POSITIONS = 64


def synchronizer(sizes: SyncSizes, **like) -> FeatureSynchronizer:
    """A synchronizer whose offsets and logits depend on the query, as those of a trained one do."""
    module = FeatureSynchronizer(
        sizes.width,
        sizes.features,
        sizes.width,
        inner_dim=sizes.inner,
        heads=sizes.heads,
        points=sizes.points,
        spatial_shapes=sizes.levels,
        base=sizes.base,
        max_images=sizes.relations,
        **like,
    )
    for layer in (module.sampling_offsets, module.attention_weights):
        nn.init.normal_(layer.weight, std=sizes.width**-0.5)
    return module


class SynchronizerBlock(nn.Module):
    """A block as the original has it: a map [B, d, side, side] and the same with what was read added to it.

    Its steps are a norm of the map's rows, a table of positions resized to the map, a norm of the features, the
    synchronizer, a 1x1 convolution and the residual.
    """

    def __init__(self, sizes: SyncSizes, **like):
        super().__init__()
        self.sizes = sizes
        self.query_norm = nn.LayerNorm(sizes.width, eps=EPS, **like)
        self.feat_norm = nn.LayerNorm(sizes.features, eps=EPS, **like)
        self.pos_embed = nn.Parameter(torch.randn(POSITIONS**2, sizes.width, **like) / 2, requires_grad=False)
        self.mmfs = synchronizer(sizes, **like)
        self.conv = nn.Conv2d(sizes.width, sizes.width, 1, **like)

    def queries(self, map: torch.Tensor) -> torch.Tensor:
        """The normalised rows of a map with their positions, [B, side * side, d]."""
        return self.query_norm(rows_of(map)) + self.positions()

    def positions(self) -> torch.Tensor:
        """The table of positions, resized in float32 to the side of the map: [side * side, d]."""
        if self.sizes.side == POSITIONS:
            return self.pos_embed
        table = self.pos_embed.float().view(1, POSITIONS, POSITIONS, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(self.sizes.side,) * 2, mode="bicubic", align_corners=False)
        return rows_of(table)[0].to(self.pos_embed.dtype)

    def forward(self, map: torch.Tensor, features: torch.Tensor, points: torch.Tensor, *, backend: str) -> torch.Tensor:
        read = self.mmfs(self.queries(map), self.feat_norm(features), points, backend=backend)
        return map + self.conv(map_of(read))

    def pack(self) -> PackedFeatureSynchronizer:
        """The packed synchronizer, which takes normalised rows and features, with the rest of the block folded in."""
        return self.mmfs.pack(
            query_gain=self.query_norm.weight,
            query_shift=self.query_norm.bias + self.positions(),
            feature_gain=self.feat_norm.weight,
            feature_shift=self.feat_norm.bias,
            output_weight=self.conv.weight,
            output_bias=self.conv.bias,
        )


def packed_values(packed: PackedFeatureSynchronizer, features: torch.Tensor) -> torch.Tensor:
    """The values of pictures for a packed block."""
    return packed.values(F.layer_norm(features, features.shape[-1:], eps=EPS))


def packed_block(
    packed: PackedFeatureSynchronizer,
    map: torch.Tensor,
    values: torch.Tensor,
    points: torch.Tensor,
    index: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """What SynchronizerBlock returns, by its packed form."""
    rows = F.layer_norm(rows_of(map), map.shape[1:2], eps=EPS)
    return map + map_of(packed(rows, values, points, index=index, backend=backend))


def rows_of(map: torch.Tensor) -> torch.Tensor:
    """The pixels of a map [B, d, h, w] as rows [B, h * w, d]."""
    return map.flatten(2).transpose(1, 2)


def map_of(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, side * side, d] as a map [B, d, side, side]."""
    side = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).unflatten(2, (side, side))


def pixel_centres(side: int, device: str) -> torch.Tensor:
    """The reference points of a map's pixels, [1, side * side, 1, 2] as (x, y) in float32."""
    at = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 1, 2)
