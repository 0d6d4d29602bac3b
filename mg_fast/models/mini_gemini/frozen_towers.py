"""The towers of a model taken out of it, frozen and packed: the part of the picture side that training leaves alone.

A model without towers trains mining, projector and language model on what the towers compute. Whatever wraps the model
(data-parallel copies, shards, adapters, an optimizer) then never meets the towers.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...modules.clip import PackedClip
from .modeling import MiniGeminiModel
from .picture_side import PictureSteps
from .vision import low_resolution_features

logger = logging.getLogger(__name__)


class TowerFeatures(NamedTuple):
    """What the towers compute of pictures; a model takes it as `tower_features`.

    Attributes:
        queries: [n_images, V, N, D], views in the order of pixel_values.
        pyramid: stage maps [n_images, HR / 4 / 2**s, HR / 4 / 2**s, C_s], s = 0..3.
    """

    queries: torch.Tensor
    pyramid: list[torch.Tensor]


class FrozenTowers(PictureSteps):
    """Both towers of a model, taken out of it.

    A call computes features without gradients, with packed copies where the towers can be packed. `put_back` gives
    the towers to the model again.

    Args:
        model: the MiniGeminiModel. Its `vision_tower` and `vision_tower_aux` are None from now on.
        device: where the towers compute. Default: where they are.
        dtype: what they compute in. Default: what their weights are in.

    Raises:
        ValueError: the model has no towers.
    """

    def __init__(
        self, model: MiniGeminiModel, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        if model.vision_tower is None or model.vision_tower_aux is None:
            raise ValueError("FrozenTowers: expected a model with both towers, got one whose towers were taken out")
        self.config = model.config
        place = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        towers = [tower.requires_grad_(False).eval() for tower in (model.vision_tower, model.vision_tower_aux)]
        self.vision_tower, self.vision_tower_aux = (tower.to(**place) if place else tower for tower in towers)
        model.vision_tower = model.vision_tower_aux = None
        self._low, self._high = self._low_tower(), self._high_tower()

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, pixel_values_hr: torch.Tensor, *, backend: str | None = None
    ) -> TowerFeatures:
        """The features of pictures.

        Args:
            pixel_values: [n_images, V, 3, LR, LR], as the processor returns them.
            pixel_values_hr: [n_images, 3, HR, HR].
            backend: overrides the choice in force.

        Raises:
            ValueError: the pixels have other shapes than the model takes.
        """
        self.check_pixels(pixel_values, pixel_values_hr)
        weight = self.vision_tower_aux.vision_stem[0].weight
        low, high = pixel_values.to(weight.device), pixel_values_hr.to(weight.device)
        queries = self.low_resolution_queries(low, tower=lambda views: self._low(views, backend))
        return TowerFeatures(queries, self._high(high, backend))

    def nothing(self) -> TowerFeatures:
        """The features of one picture, all of them zero, for a batch without pictures."""
        weight, config = self.vision_tower_aux.vision_stem[0].weight, self.config
        queries = weight.new_zeros(1, config.views, config.tokens_per_view, config.mm_hidden_size)
        side = config.image_size_aux // 4
        dims = config.vision_config_aux["dims"]
        return TowerFeatures(queries, [weight.new_zeros(1, side >> s, side >> s, c) for s, c in enumerate(dims)])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The towers' tensors by their names in MiniGeminiForConditionalGeneration."""
        towers = {"vision_tower": self.vision_tower, "vision_tower_aux": self.vision_tower_aux}
        return {
            f"model.{name}.{key}": tensor
            for name, tower in towers.items()
            for key, tensor in tower.state_dict().items()
        }

    def put_back(self, model: MiniGeminiModel) -> None:
        """Gives the towers to a model that has none."""
        model.vision_tower, model.vision_tower_aux = self.vision_tower, self.vision_tower_aux

    def _low_tower(self) -> Callable[[torch.Tensor, str | None], torch.Tensor]:
        select = self.config.mm_vision_select_layer
        packed = _packed(lambda: PackedClip.from_tower(self.vision_tower, select))
        if packed is not None:
            return lambda views, backend: packed(views, backend=backend)
        return lambda views, backend: low_resolution_features(
            self.vision_tower, views.to(self.vision_tower.dtype), select, backend=backend
        )

    def _high_tower(self) -> Callable[[torch.Tensor, str | None], list[torch.Tensor]]:
        tower = _packed(self.vision_tower_aux.pack) or self.vision_tower_aux
        return lambda pixels, backend: tower(pixels, backend=backend)


def _packed(pack: Callable[[], Callable]) -> Callable | None:
    """What `pack` makes; None, with a warning, where the tower cannot be packed."""
    try:
        return pack()
    except ValueError as error:
        logger.warning("a frozen tower runs as it is, without packing: %s", error)
        return None
