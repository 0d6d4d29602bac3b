"""Mini-Gemini's answers to the questions that the vision stage asks a model (`mg_fast.models.protocol`)."""

from collections.abc import Mapping

from torch import nn

from .encoder import PictureEncoder, picture_state


class MiniGeminiSeeing:
    """A base class that makes MiniGeminiForConditionalGeneration a SeeingModel."""

    @property
    def picture_parts(self) -> Mapping[str, nn.Module]:
        return {"vision_tower": self.model.vision_tower, "vision_tower_aux": self.model.vision_tower_aux}

    def picture_encoder(self, *, graphs: bool = True) -> PictureEncoder:
        return PictureEncoder(self.model, graphs=graphs)

    def picture_state(self) -> tuple:
        return picture_state(self.model)
