"""MM-Interleaved's features of pictures, and its answers to what an engine asks a model that sees."""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...runtime.placement import execution_device
from .encoder import FeatureEncoder, picture_state


class InterleavedSeeing:
    """A base class that makes MMInterleavedForConditionalGeneration a model that sees.

    It differs from `mg_fast.models.protocol.SeeingModel` in one point: a picture's features are image tokens and
    feature maps, so its packed encoder returns `VisualFeatures`.
    """

    @property
    def picture_parts(self) -> Mapping[str, nn.Module]:
        return {"visual_tokenizer": self.visual_tokenizer}

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        *,
        backend: str | None = None,
        stage: Callable = contextlib.nullcontext,
    ) -> BaseModelOutputWithPooling:
        """The features of pictures.

        Args:
            pixel_values: [n, 3, 224, 224], floating point in 0..1.
            backend: overrides the choice in force.
            stage: called with the name of every step; returns the context that the step runs in.

        Returns:
            `pooler_output`: image tokens [n, T, D]; `last_hidden_state`: feature maps [n, 5440, C] with their
            positions, the levels of 64 x 64, 32 x 32, 16 x 16 and 8 x 8 pixels, each row by row.
        """
        pixel_values = pixel_values.to(execution_device(self.visual_tokenizer))
        features = self.visual_tokenizer(pixel_values, backend=backend, stage=stage)
        return BaseModelOutputWithPooling(last_hidden_state=features.maps, pooler_output=features.tokens)

    def picture_encoder(self, *, graphs: bool = True) -> FeatureEncoder:
        """The picture side as it is now, packed. ValueError where it computes something else than its weights say."""
        return FeatureEncoder(self.visual_tokenizer, graphs=graphs)

    def picture_state(self) -> tuple:
        return picture_state(self.visual_tokenizer)
