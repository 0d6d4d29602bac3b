"""The picture side of Mini-Gemini, from pixels to image tokens: both towers, patch info mining and the projector.

`MiniGeminiModel` has it beside its language model. `PictureSide` has it alone, for programs that run another
implementation of the language model.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import CLIPVisionModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...modules import ConvNeXtPyramid, PatchInfoMining
from ...ops import reference
from ...runtime.layer_dtypes import call
from .configuration import MiniGeminiConfig
from .vision import PictureFeatures, build_projector, low_resolution_features


class PictureSteps:
    """A base class that gives a module the parts of the picture side and the steps through them.

    Attributes:
        config: the model's MiniGeminiConfig; the module sets it.
        vision_tower: CLIP, the low-resolution tower.
        vision_tower_aux: ConvNeXt, the high-resolution tower.
        patch_mining: patch info mining.
        mm_projector: the projector to the width of the language model.
    """

    def build_picture_side(self, config: MiniGeminiConfig) -> None:
        """Makes the four parts, with weights that are yet to be loaded."""
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.vision_tower_aux = ConvNeXtPyramid.from_dims(**config.vision_config_aux)
        self.patch_mining = PatchInfoMining(config.mm_hidden_size, config.vision_config_aux["dims"])
        self.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, config.text_config.hidden_size
        )

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> BaseModelOutputWithPooling:
        """Computes the image tokens of pictures.

        Args:
            pixel_values: [n_images, V, 3, LR, LR] with V = 1, or in HD the tiles row by row and the global view last.
            pixel_values_hr: [n_images, 3, HR, HR].
            backend: overrides the choice in force.
            stage: called with the name of every stage; returns the context that the stage runs in (`Meter.stage`
                measures stages).

        Returns:
            `pooler_output`: image tokens [n_images, T, hidden], T = 576 or 2880, global view first, unscaled.
            `last_hidden_state`: the tokens before the projector, [n_images, T, D].
        """
        features = self.picture_features(pixel_values, pixel_values_hr, backend=backend, stage=stage)
        return BaseModelOutputWithPooling(last_hidden_state=features.tokens, pooler_output=features.image_tokens)

    def picture_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_hr: torch.Tensor,
        *,
        see_low: Callable[[torch.Tensor], torch.Tensor] | None = None,
        see_high: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
        mine: Callable[[torch.Tensor, list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]] | None = None,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> PictureFeatures:
        """Runs all steps from pixels to image tokens: low-resolution tower, high-resolution tower, mining, projector.

        Packed or compiled parts may replace the model's own. Each is given as a function that is called once.

        Args:
            pixel_values, pixel_values_hr: as in `get_image_features`.
            see_low: from pixel_values to queries; default `low_resolution_queries`.
            see_high: from pixel_values_hr to stage maps, channels last; default the high-resolution tower.
            mine: from queries and stage maps to image tokens, and the tokens before the projector; default
                `mine_and_project`.
            backend: for those of the three that are the model's own; overrides the choice in force.
            stage: as in `get_image_features`. A part that replaces mining and projector is one stage.
        """
        self.check_pixels(pixel_values, pixel_values_hr)
        see_low = see_low or functools.partial(self.low_resolution_queries, backend=backend)
        see_high = see_high or functools.partial(self.vision_tower_aux, backend=backend)
        mine = mine or functools.partial(self.mine_and_project, backend=backend, stage=stage)
        with stage("LR tower"):
            queries = see_low(pixel_values)
        with stage("HR tower"):
            pyramid = [level.to(queries.device) for level in see_high(pixel_values_hr)]
        image_tokens, tokens = mine(queries, pyramid)
        return PictureFeatures(queries, pyramid, tokens, image_tokens)

    def mine_and_project(
        self,
        queries: torch.Tensor,
        pyramid: list[torch.Tensor],
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns the towers' features into image tokens.

        Args:
            queries: [n_images, V, N, D], views in the order of pixel_values.
            pyramid: stage maps of the pictures, channels last.
            backend, stage: as in `get_image_features`.

        Returns:
            Image tokens [n_images, T, hidden], global view first, unscaled; and the tokens before the projector,
            [n_images, T, D].
        """
        with stage("patch info mining"):
            mined = self.patch_mining(queries, pyramid, grid=self.config.image_grid, backend=backend)
            # The sum has the wider dtype where those of CLIP and mining differ.
            tokens = reference.order_tokens(queries + mined.to(queries.device), grid=self.config.image_grid)
        with stage("projector"):
            return call(self.mm_projector, tokens), tokens

    def low_resolution_queries(
        self,
        pixel_values: torch.Tensor,
        *,
        backend: str | None = None,
        tower: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Turns low-resolution views [n_images, V, 3, LR, LR] into queries [n_images, V, N, D] in the same order.

        `tower` replaces CLIP.
        """
        n, cells = len(pixel_values), self.config.image_grid**2
        # The batch holds all tiles of all pictures and then the global views. This is the original's order, kept so
        # that numbers match to the last bit.
        tiles = pixel_values[:, :cells].flatten(0, 1)
        views = torch.cat([tiles, pixel_values[:, cells:].flatten(0, 1)])
        if tower is None:
            features = low_resolution_features(
                self.vision_tower, views, self.config.mm_vision_select_layer, backend=backend
            )
        else:
            features = tower(views)
        return torch.cat(
            [features[: len(tiles)].unflatten(0, (n, cells)), features[len(tiles) :].unflatten(0, (n, -1))], dim=1
        )

    def check_pixels(self, pixel_values: torch.Tensor, pixel_values_hr: torch.Tensor | None) -> None:
        """Raises ValueError for pixels of shapes that the model does not take."""
        if pixel_values_hr is None:
            raise ValueError("pixel_values came without pixel_values_hr: the processor returns both")
        config, n = self.config, len(pixel_values)
        low = (n, config.views, 3, config.vision_config.image_size, config.vision_config.image_size)
        high = (n, 3, config.image_size_aux, config.image_size_aux)
        for name, tensor, expected in (("pixel_values", pixel_values, low), ("pixel_values_hr", pixel_values_hr, high)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {list(expected)} for {n} picture(s), got {list(tensor.shape)}")


class PictureSide(PictureSteps, nn.Module):
    """The picture side without a language model. `PictureEncoder` packs it like a whole model.

    Its parameters have the names of `MiniGeminiModel`'s.

    Args:
        config: the configuration of the whole model, with the geometry of its towers.
    """

    def __init__(self, config: MiniGeminiConfig):
        super().__init__()
        self.config = config
        self.build_picture_side(config)


def as_embeddings(image_tokens: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Scales image tokens [..., hidden] as the language model's embedding module scales the embeddings of text.

    Gemma's module does so, and image tokens bypass it. There, too, the factor is rounded to the model's dtype. Other
    language models scale nothing.
    """
    if text_config.model_type != "gemma":
        return image_tokens
    return image_tokens * torch.tensor(text_config.hidden_size**0.5, dtype=image_tokens.dtype)
