"""The visual tokenizer: from a picture's pixels to tokens for the language model, and feature maps."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...errors import CheckpointError
from .clip_adapter import GRID, AdaptedClip
from .configuration import MAP_SIDES, PICTURE_SIDE, MMInterleavedConfig
from .perceiver import PerceiverResampler
from .positions import grid_positions, resized_positions


class VisualFeatures(NamedTuple):
    """What the picture side computes of n pictures.

    Attributes:
        tokens: [n, T, D], the tokens that stand for a picture in the language model.
        maps: [n, 5440, C], the feature maps with their positions added: the levels of 64 x 64, 32 x 32, 16 x 16 and
            8 x 8 pixels, each row by row. The language model reads the last `config.pixels_of_llm` of them.
        vit_tokens: [n, 257, C], the output of CLIP's last layer, the token of the class first.
    """

    tokens: torch.Tensor
    maps: torch.Tensor
    vit_tokens: torch.Tensor


class VisualTokenizer(nn.Module):
    """CLIP with an adapter, and a perceiver resampler over CLIP's tokens.

    The parameters have the published names.

    Args:
        config: the configuration of the model.

    Raises:
        CheckpointError: the configuration's sizes contradict each other, or the tower is not one that the adapter fits.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        vision, perceiver = config.vision_config, config.visual_perceiver or {}
        width, read = vision.hidden_size, perceiver.get("encoder_hidden_size")
        if not config.image_embed_dim == width == read:
            raise CheckpointError(
                "image_embed_dim, the vision tower's width and the perceiver's encoder_hidden_size must agree, got "
                f"{config.image_embed_dim}, {width} and {read}"
            )
        if perceiver.get("num_queries") != config.num_img_token:
            raise CheckpointError(
                f"the visual perceiver's num_queries must be num_img_token, which is {config.num_img_token}, got "
                f"{perceiver.get('num_queries')}"
            )
        tower = AdaptedClip(vision, spm_inplane=config.spm_inplane, points=config.adapter_points)
        self.encoder = nn.ModuleDict({"vision_model": tower})
        self.pos_proj, self.pos_ln = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        positions = torch.cat([torch.zeros(1, width, device="cpu"), grid_positions(GRID, width)])
        self.pos_embed = nn.Parameter(positions.to(self.pos_proj.weight), requires_grad=False)
        self.post_ln = nn.LayerNorm(width, eps=1e-6)
        self.perceiver_resampler = PerceiverResampler(perceiver)
        self.proj = nn.Linear(self.perceiver_resampler.queries.shape[-1], config.text_config.hidden_size)
        for name, numbers in (("clip_mean", OPENAI_CLIP_MEAN), ("clip_std", OPENAI_CLIP_STD)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).view(1, 3, 1, 1))

    @property
    def vision_model(self) -> AdaptedClip:
        return self.encoder["vision_model"]

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        see: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        backend: str | None = None,
        stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> VisualFeatures:
        """The features of pictures.

        Args:
            pixel_values: [n, 3, 224, 224], floating point in 0..1.
            see: replaces the tower. It is called with normalised pixels, and returns what `AdaptedClip.forward` does.
            backend: overrides the choice in force.
            stage: called with the name of every step; returns the context that the step runs in.

        Raises:
            ValueError: the pixels have another shape or dtype.
        """
        self.check_pixels(pixel_values)
        with stage("vision tower"):
            vit_tokens, maps = (see or self._see)(self.normalized(pixel_values), backend=backend)
            maps = maps + resized_positions(self.pos_embed, MAP_SIDES, skip=1, dtype=maps.dtype)
        with stage("perceiver"):
            projected = self.pos_ln(self.pos_proj(vit_tokens))
            read = self.post_ln(projected + self.pos_embed.to(projected.dtype))
            tokens = self.proj(self.perceiver_resampler(read))
        return VisualFeatures(tokens, maps, vit_tokens)

    def _see(self, pixels: torch.Tensor, *, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vision_model(pixels, backend=backend)

    def normalized(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels in 0..1 as CLIP takes them, in the dtype of the tower."""
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        mean, std = (buffer.to(pixels) for buffer in (self.clip_mean, self.clip_std))
        return ((pixels - mean) / std).to(self.pos_proj.weight.dtype)

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises ValueError for pixels of a shape or dtype that the model does not take."""
        expected = (3, PICTURE_SIDE, PICTURE_SIDE)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values: expected {['n', *expected]}, got {list(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values: expected floating-point numbers in 0..1, got {pixel_values.dtype}; divide 8 bits by 255"
            )
