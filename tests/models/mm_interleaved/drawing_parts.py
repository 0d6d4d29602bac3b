"""The tiny models that draw, and what the original recorded of their pictures."""

import functools

import torch

from mg_fast.models.mm_interleaved.configuration import MAP_SIDES
from mg_fast.models.mm_interleaved.context import PlacedPicture, place_pictures, select_targets
from tests.models.mm_interleaved.loaded import load
from tests.models.mm_interleaved.recorded import answers

# Of a stage's largest value; of a picture's values; and of those after 30 steps.
STAGE, PICTURE, PICTURE_30 = 2e-5, 1e-4, 1.2e-4
RECORDED_MAPS = {0: "skip0", 5: "skip5", 11: "skip11", 12: "mid"}


class Recorded:
    """A tiny model, and what the original answered with its weights."""

    def __init__(self, name: str):
        self.model, self.answers = load(name), answers(name)

    @property
    def maps(self) -> torch.Tensor:
        """The maps of picture 0, [1, 5440, C]; the original recorded all levels of this one."""
        return torch.cat([self.answers[f"image0.map{side}"].flatten(1).T for side in MAP_SIDES])[None]

    def targets(self, request: str) -> list[PlacedPicture]:
        ids, mask = (self.answers[f"{request}.{key}"] for key in ("text_ids", "attention_mask"))
        placed = place_pictures(ids, mask, self.model.config)
        return select_targets(placed, len(ids), self.answers.get(f"{request}.target_image_idxs"))


@functools.cache
def recorded(name: str) -> Recorded:
    return Recorded(name)
