"""Mini-Gemini's low-resolution features and its projector, the parts on either side of mining."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoder

from ...errors import CheckpointError
from ...ops import backend as backends
from ...ops.operation import Operation, register
from ...runtime.layer_dtypes import Chain
from ...runtime.weights import why_not_plain


class PictureFeatures(NamedTuple):
    """What the picture side computes from pictures, step by step.

    Attributes:
        queries: [n_images, V, N, D] from the low-resolution tower, views in the order of pixel_values.
        pyramid: stage maps [n_images, HR / 4 / 2**s, HR / 4 / 2**s, C_s] of the high-resolution tower, s = 0..3.
        tokens: [n_images, T, D], queries with the features that they mined, global view first.
        image_tokens: [n_images, T, hidden], the tokens after the projector, unscaled.
    """

    queries: torch.Tensor
    pyramid: list[torch.Tensor]
    tokens: torch.Tensor
    image_tokens: torch.Tensor


def low_resolution_features(
    tower: CLIPVisionModel, views: torch.Tensor, select_layer: int = -2, *, backend: str | None = None
) -> torch.Tensor:
    """CLIP's patch features of low-resolution views: one hidden state without its CLS token.

    Args:
        tower: the CLIP vision model.
        views: [B, 3, LR, LR].
        select_layer: index into the hidden states; -2 is the output of the second-to-last layer, before any final norm.
        backend: overrides the choice in force.

    Returns:
        [B, N, D] in the tower's dtype. The `reference` backend runs every layer, as the original does. Other backends
        stop at the layer that is wanted.
    """
    # The layers are called one by one below, and no tensor of the tower and the encoder themselves is read.
    called = {"reads": (), "placed": True}
    if why_not_plain("tower", tower, known={CLIPVisionModel}, **called) or why_not_plain(
        "encoder", tower.encoder, known={CLIPEncoder}, **called
    ):
        # The tower or encoder does more than call its layers, so it has to run as it is.
        return tower(views, output_hidden_states=True).hidden_states[select_layer][:, 1:]
    layers = len(tower.encoder.layers)
    wanted = select_layer if select_layer >= 0 else layers + 1 + select_layer
    return backends.choose_form(LOW_RESOLUTION_TOWER, backend, views.device)(tower, views, wanted)[:, 1:]


def _through_every_layer(tower: CLIPVisionModel, views: torch.Tensor, wanted: int) -> torch.Tensor:
    """Finishes the tower and discards the rest, as the original does."""
    layers = len(tower.encoder.layers)
    selected, hidden = _hidden_state(tower, views, wanted, layers)
    if layers > wanted:
        tower.post_layernorm(hidden[:, 0])
    return selected


def _up_to_the_layer_wanted(tower: CLIPVisionModel, views: torch.Tensor, wanted: int) -> torch.Tensor:
    return _hidden_state(tower, views, wanted, wanted)[0]


def _hidden_state(
    tower: CLIPVisionModel, views: torch.Tensor, wanted: int, run: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of layer `wanted`, counted from 1, and the output of the last layer that was run."""
    weight = tower.pre_layrnorm.weight
    if not weight.is_meta:
        # The layers are called one by one, which bypasses the hook that moves inputs under a device map.
        views = views.to(weight.device)
    hidden = tower.pre_layrnorm(tower.embeddings(views))
    selected = hidden
    for i, layer in enumerate(tower.encoder.layers[:run], 1):
        hidden = layer(hidden, attention_mask=None)
        if i == wanted:
            selected = hidden
    return selected, hidden


LOW_RESOLUTION_TOWER = register(
    Operation(
        name="low_resolution_tower",
        forms={"reference": _through_every_layer, "torch": _up_to_the_layer_wanted},
        auto=("torch", "reference"),
    )
)


def build_projector(kind: str, width: int, hidden: int) -> nn.Module:
    """Builds `mm_projector` from a config's `mm_projector_type`: `linear`, `identity` or `mlpNx_gelu` (exact GELU)."""
    if kind == "linear":
        return nn.Linear(width, hidden)
    if kind == "identity":
        return nn.Identity()
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if not (kind == f"mlp{depth}x_gelu" and depth.isdigit() and int(depth) > 0):
        raise CheckpointError(f"mm_projector_type: expected linear, identity or mlpNx_gelu, got {kind!r}")
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(int(depth) - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return Chain(*layers)
