"""The part of the tiny models that follows on the language model, and what the original recorded of it."""

import functools
from types import SimpleNamespace

import torch
from torch import nn

from mg_fast.models.mm_interleaved.configuration import MAP_SIDES
from mg_fast.models.mm_interleaved.context import PlacedPicture, place_pictures, select_targets
from mg_fast.models.mm_interleaved.drawing import PictureGeneration
from mg_fast.models.mm_interleaved.image_decoder import ImageDecoder
from tests.models.mm_interleaved.recorded import answers, read_config, state

# Of a stage's largest value; of a picture's values; and of those after 30 steps.
STAGE, PICTURE, PICTURE_30 = 2e-5, 1e-4, 1.2e-4
RECORDED_MAPS = {0: "skip0", 5: "skip5", 11: "skip11", 12: "mid"}


class Drawing(PictureGeneration, nn.Module):
    """A tiny model whose language model and vision tower answer what the original recorded for one request."""

    def __init__(self, name: str):
        super().__init__()
        self.config, self.request = read_config(name), None
        self.answers = answers(name)
        width = self.config.text_config.hidden_size
        self.context_feat_proj, self.image_decoder = nn.Linear(width, width), ImageDecoder(self.config)
        parts = {key: state(name, f"{key}.") for key in ("context_feat_proj", "image_decoder")}
        self.load_state_dict({f"{part}.{key}": tensor for part, own in parts.items() for key, tensor in own.items()})
        self.eval().requires_grad_(False)

    def get_image_features(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=None, last_hidden_state=self.maps().repeat(len(pixel_values), 1, 1))

    def forward(self, **_) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[self.answers[f"{self.request}.last_hidden"]])

    def maps(self) -> torch.Tensor:
        """The maps of picture 0, [1, 5440, C]; the original recorded all levels of this one."""
        return torch.cat([self.answers[f"image0.map{side}"].flatten(1).T for side in MAP_SIDES])[None]

    def targets(self, request: str) -> list[PlacedPicture]:
        ids, mask = (self.answers[f"{request}.{key}"] for key in ("text_ids", "attention_mask"))
        placed = place_pictures(ids, mask, self.config)
        return select_targets(placed, len(ids), self.answers.get(f"{request}.target_image_idxs"))


@functools.cache
def drawing(name: str) -> Drawing:
    return Drawing(name)
