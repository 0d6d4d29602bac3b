"""CLIP's vision tower with an adapter, which gives the tower's tokens and feature maps of four sizes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ...errors import CheckpointError
from .adapter import AdapterInteraction, SpatialPriorModule, as_map, as_tokens
from .configuration import MAP_SIDES

# The number of interactions between tower and adapter, and of the extractors that the last one has besides its first.
INTERACTIONS, EXTRA_EXTRACTORS = 4, 2
# The tower that the adapter fits: its layers, and the side of its grid of patches.
LAYERS, GRID = 24, MAP_SIDES[2]
# The side in pixels of the picture that the spatial prior module sees.
PRIOR_SIDE = 4 * MAP_SIDES[0]


class AdaptedClip(CLIPVisionModel):
    """CLIP's vision tower between the parts of an adapter, without the norm after its last layer.

    Args:
        config: the tower's configuration: 24 layers, and 16 x 16 patches.
        spm_inplane: channels of the first convolutions of the spatial prior module.
        points: points that a head of the adapter's attention reads in each map. There are as many heads as in the
            tower.

    Raises:
        CheckpointError: the tower has another number of layers or patches.
    """

    def __init__(self, config: CLIPVisionConfig, *, spm_inplane: int, points: int):
        if config.num_hidden_layers != LAYERS or config.image_size // config.patch_size != GRID:
            raise CheckpointError(
                f"the vision tower must have {LAYERS} layers and {GRID} x {GRID} patches, got "
                f"{config.num_hidden_layers} layers, and patches of {config.patch_size} pixels in pictures of "
                f"{config.image_size}"
            )
        super().__init__(config)
        self.post_layernorm = nn.Identity()
        # Published checkpoints store these numbers, and the original's loader asks for them.
        self.embeddings.register_buffer("position_ids", self.embeddings.position_ids, persistent=True)
        width, heads = config.hidden_size, config.num_attention_heads
        levels = MAP_SIDES[1:]
        self.adapter_level_embed = nn.Parameter(torch.zeros(len(levels), width))
        self.adapter_spm = SpatialPriorModule(spm_inplane, width)
        self.adapter_interactions = nn.ModuleList(
            AdapterInteraction(width, len(levels), heads, points, EXTRA_EXTRACTORS if i == INTERACTIONS - 1 else 0)
            for i in range(INTERACTIONS)
        )
        self.adapter_up = nn.ConvTranspose2d(width, width, 2, 2)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, 224, 224] to the input [n, 1 + patches, width] of the first layer."""
        return self.pre_layrnorm(self.embeddings(pixels))

    def run_layers(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The hidden states after the layers from `first` up to the one before `last`."""
        for layer in self.encoder.layers[first:last]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def forward(
        self,
        pixels: torch.Tensor,
        *,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        run_layers: Callable[[torch.Tensor, int, int], torch.Tensor] | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's tokens and the feature maps of normalised pictures.

        Args:
            pixels: [n, 3, 224, 224], in the dtype of the tower.
            embed, run_layers: replace the methods of these names.
            backend: overrides the choice in force.

        Returns:
            The tokens after the last layer, [n, 1 + 256, width], that of the class first; and the maps without
            positions, [n, 5440, width], of the sides 64, 32, 16 and 8, each row by row.
        """
        embed, run_layers = embed or self.embed, run_layers or self.run_layers
        seen = F.interpolate(pixels, size=(PRIOR_SIDE, PRIOR_SIDE), mode="bilinear", align_corners=False)
        largest, *coarse = self.adapter_spm(seen)
        sides = MAP_SIDES[1:]
        prior = torch.cat([as_tokens(level) + own for level, own in zip(coarse, self.adapter_level_embed)], dim=1)
        hidden, patches = embed(pixels), []
        step = LAYERS // INTERACTIONS
        for i, interaction in enumerate(self.adapter_interactions):
            injected = interaction.injector(hidden[:, 1:], prior, GRID, sides, backend=backend)
            hidden = run_layers(torch.cat([hidden[:, :1], injected], dim=1), i * step, (i + 1) * step)
            patches.append(hidden[:, 1:])
            for extractor in interaction.extractors:
                prior = extractor(prior, patches[-1], GRID, sides, backend=backend)
        return hidden, self._maps(largest, prior, patches)

    def _maps(self, largest: torch.Tensor, prior: torch.Tensor, patches: list[torch.Tensor]) -> torch.Tensor:
        """The maps of the prior, each with the patches after one of the interactions."""
        finer = self.adapter_up(as_map(prior[:, : MAP_SIDES[1] ** 2], MAP_SIDES[1]))
        levels = [as_tokens(largest + finer), prior]
        resized = []
        for side, tokens in zip(MAP_SIDES, patches):
            if side != GRID:
                size = (side, side)
                tokens = as_tokens(F.interpolate(as_map(tokens, GRID), size=size, mode="bilinear", align_corners=False))
            resized.append(tokens)
        return torch.cat(levels, dim=1).add_(torch.cat(resized, dim=1))
