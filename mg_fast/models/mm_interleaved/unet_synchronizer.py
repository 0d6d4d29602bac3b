"""The synchronizers in the diffusion decoder's U-Net, which read the previous picture's feature maps."""

import torch
from torch import nn

from ...errors import quoted
from ...modules import FeatureSynchronizer
from ...runtime.device_tables import cached_on_device
from .configuration import DRAWN_SIDE, MAP_SIDES, UNET_MAX_IMAGES, MMInterleavedConfig
from .positions import grid_positions, resized_positions
from .residuals import Residual

# The epsilon of the norms in every block.
EPS = 1e-6
# Side of the U-Net's largest map, and of the table of positions, for a picture of `DRAWN_SIDE` pixels.
GRID = 64


class UNetSynchronizer(nn.Module):
    """What every map that the U-Net's up path takes gets from the previous picture.

    There is a block for every skip tensor of the down path, `mmfs_down_blocks.0` to `11`, and one for the output of the
    mid block, `mmfs_mid_block`. This is the form with the original's parameters and steps; `PackedUNetSynchronizer` is
    the one for inference.

    Args:
        config: unet_config says how wide the maps are, and image_size how large: a picture of 512 / f pixels has tables
            of positions of 64 / f pixels, and offsets are counted in pixels of the map that is added to.

    Attributes:
        grid: side of the largest map, which is also that of the latents.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        unet = config.unet_config
        widths, layers = unet["block_out_channels"], unet["layers_per_block"]
        self.grid = grid = GRID * config.image_size // DRAWN_SIDE
        smallest = 2 ** (len(widths) - 1)
        if DRAWN_SIDE % config.image_size or grid % smallest:
            raise ValueError(
                f"UNetSynchronizer: image_size must divide {DRAWN_SIDE} and be a multiple of "
                f"{smallest * DRAWN_SIDE // GRID}, got {quoted(config.image_size)}"
            )
        if not isinstance(layers, int):
            raise ValueError(
                f"UNetSynchronizer: layers_per_block must be one whole number for all blocks, got {quoted(layers)}"
            )
        # The first convolution gives the first skip. Every block gives one for each of its layers, and one for the
        # halved map that the next block takes.
        maps = [(widths[0], grid)]
        for level, width in enumerate(widths):
            side = grid >> level
            maps += [(width, side)] * layers
            if level + 1 < len(widths):
                maps.append((width, side // 2))
        self.mmfs_down_blocks = nn.ModuleList(UNetSynchronizerBlock(config, *sizes, grid) for sizes in maps)
        self.mmfs_mid_block = UNetSynchronizerBlock(config, *maps[-1], grid)

    @property
    def blocks(self) -> list["UNetSynchronizerBlock"]:
        """All blocks; that of the mid block is the last."""
        return [*self.mmfs_down_blocks, self.mmfs_mid_block]

    def prepare(self, maps: torch.Tensor | None, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `residuals` takes in every step of a picture.

        Args:
            maps: [B, n, S, C], feature maps of n pictures for every row, the largest level first; None: no row has one.
            mask: [B, n], not 0 where the row has the picture; None: every row has all.

        Returns:
            The maps and the mask; without maps, those of no picture.
        """
        if maps is not None:
            return maps, mask
        some = self.mmfs_mid_block.mmfs
        return some.value_proj.weight.new_zeros(1, 0, some.sizes.pixels, some.sizes.value), None

    def residuals(
        self, maps: torch.Tensor, mask: torch.Tensor | None, *, halves: int = 1, backend: str | None = None
    ) -> list[Residual]:
        """What is added to each map: the residual of every block, that of the mid block last.

        Args:
            maps, mask: from `prepare`.
            halves: rows of the U-Net's batch for each row of `maps`, next to each other: 2 with guidance.
            backend: overrides the choice in force.
        """
        if maps.shape[1]:
            # As in the original, both halves of a guided batch read maps of their own.
            maps = maps.repeat_interleave(halves, 0)
            mask = None if mask is None else mask.repeat_interleave(halves, 0)

        def of(block: UNetSynchronizerBlock) -> Residual:
            return Residual(lambda skip: block(skip, maps.expand(len(skip), -1, -1, -1), mask, backend=backend))

        return [of(block) for block in self.blocks]


class UNetSynchronizerBlock(nn.Module):
    """One block: the residual of one map of the U-Net.

    Its steps are a norm of the map's pixels, to which their positions are added, a norm of the features, the
    synchronizer, and a 1x1 convolution, which is zero in a new module.

    Args:
        config: the sizes of the synchronizer.
        width, side: channels and side of the map.
        grid: side of the table of positions.
    """

    def __init__(self, config: MMInterleavedConfig, width: int, side: int, grid: int):
        super().__init__()
        self.width, self.side = width, side
        features = config.image_embed_dim
        self.query_norm = nn.LayerNorm(width, eps=EPS)
        positions = grid_positions(grid, width).to(self.query_norm.weight)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.feat_norm = nn.LayerNorm(features, eps=EPS)
        self.mmfs = FeatureSynchronizer(
            width,
            features,
            width,
            inner_dim=config.unet_mmfs_width,
            heads=config.unet_mmfs_heads,
            points=config.unet_mmfs_points,
            spatial_shapes=MAP_SIDES,
            base=side,
            max_images=UNET_MAX_IMAGES,
            offset_range=1.0,
        )
        self.conv = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def positions(self) -> torch.Tensor:
        """The table of positions, resized to the side of the map: [side * side, width]."""
        return resized_positions(self.pos_embed, (self.side,), dtype=self.pos_embed.dtype)

    def forward(
        self, skip: torch.Tensor, maps: torch.Tensor, mask: torch.Tensor | None = None, *, backend: str | None = None
    ) -> torch.Tensor:
        """The residual [B, width, side, side] of a map of the same shape.

        Args:
            skip: the map, in the dtype of the weights.
            maps: [B, n, S, C], as in `UNetSynchronizer.residuals`; without any picture (n = 0) every pixel gets what a
                pixel gets that sees none.
            mask: [B, n] or None, as there.
            backend: overrides the choice in force.

        Raises:
            ValueError: the map is of another shape than the block is made for, or the others do not fit.
        """
        check_map(skip, self.width, self.side)
        query = self.query_norm(skip.flatten(2).transpose(1, 2)) + self.positions()
        read = self.mmfs(query, self.feat_norm(maps), pixel_centres(self.side, skip.device), mask, backend=backend)
        return self.conv(read.transpose(1, 2).unflatten(2, (self.side, self.side)))


def check_map(skip: torch.Tensor, width: int, side: int) -> None:
    """Raises ValueError unless a map of the U-Net is [B, width, side, side]."""
    if skip.dim() != 4 or list(skip.shape[1:]) != [width, side, side]:
        raise ValueError(
            f"UNetSynchronizer: expected a map of the U-Net [B, {width}, {side}, {side}], got {list(skip.shape)}"
        )


@cached_on_device(limit=2**24)
def pixel_centres(side: int, device: torch.device, times: int = 1) -> torch.Tensor:
    """The reference points of a map's pixels, row by row, so many times: [1, times * side * side, 1, 2] in float32.

    A point is (x, y) in 0..1.
    """
    at = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 1, 2).repeat(1, times, 1, 1)
