"""From pixels that are on the device already to image tokens: what a GPU does for a picture, without the host's part.

`pixels` starts from the resized and normalised tensors that the towers take. `decoded` starts from the decoded picture
as a camera took it, on the device. The original resizes on the host only, so in `decoded` its steps get this project's
resizing in plain PyTorch; its own resizing is in the group `picture`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mg_fast import ops, use_backend
from mg_fast.models.mini_gemini.modeling import MiniGeminiModel
from mg_fast.models.mini_gemini.vision import low_resolution_features

from ..registry import Call, Case, Provider
from .picture import exact_tokens, make_encoder, make_model
from .settings import COMBINATIONS, Setting, devices_of, picture_pixels


@dataclass
class PixelInputs:
    """A model, and what gives a picture as the model's arguments `pixel_values` and `pixel_values_hr`.

    Attributes:
        resize: from the backend that resizes; for `pixels` it does nothing more.
    """

    device: str
    model: MiniGeminiModel
    resize: Callable[[str], dict[str, torch.Tensor]]


def cases() -> list[Case]:
    return [
        _case(group, setting, dtype)
        for setting, batch, dtype in COMBINATIONS
        if batch == 1
        for group in ("pixels", "decoded")
    ]


def _case(group: str, setting: Setting, dtype: str) -> Case:
    decoded = group == "decoded"

    def make(device: str) -> PixelInputs:
        pixels = picture_pixels(device)

        def resize(backend: str) -> dict[str, torch.Tensor]:
            hr, views = ops.dual_resize(pixels, **setting.resize, backend=backend)
            return {"pixel_values": views[None], "pixel_values_hr": hr[None]}

        resized = None if decoded else resize("torch")
        return PixelInputs(device, make_model(setting, dtype, device), resize if decoded else lambda backend: resized)

    auto = _by_encoder("auto")
    providers = {
        "reference": _by_model("reference"),
        "reference, channels last, compiled": _compiled_parts,
        "torch": _by_model("torch"),
        "auto": replace(auto, profiled=auto.build),
        "triton": _by_encoder("triton"),
    }
    return Case(
        f"{group}/{setting.name}-b1-{dtype}",
        make,
        providers,
        lambda inputs: exact_tokens(inputs.model, inputs.resize("torch")),
        devices=tuple(device for device in devices_of(setting, 1, dtype) if device == "cuda"),
        # In plain PyTorch a resize copies its tables from the host, which cannot be captured.
        capturable=not decoded,
    )


def _by_model(backend: str) -> Callable[[PixelInputs], Call]:
    """The model's own modules, as transformers runs them."""
    return lambda inputs: (
        lambda: inputs.model.get_image_features(**inputs.resize("torch"), backend=backend).pooler_output
    )


def _compiled_parts(inputs: PixelInputs) -> Call:
    """The strongest plain form: channels-last towers, and every part through torch.compile. Captured, it is one CUDA
    graph.

    The parts are compiled one by one: a compiler cannot fuse more than a whole tower, and what it made of a tower
    before is found in its cache.
    """
    model = copy.deepcopy(inputs.model)
    tower = model.vision_tower_aux.to(memory_format=torch.channels_last)
    select = model.config.mm_vision_select_layer

    def part(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)

    high = part(lambda x: tower(x, backend="reference"))
    low = part(lambda views: low_resolution_features(model.vision_tower, views, select, backend="reference"))
    mine = part(lambda queries, pyramid: model.mine_and_project(queries, pyramid, backend="reference"))

    def call() -> torch.Tensor:
        return model.picture_features(
            **inputs.resize("torch"),
            see_low=lambda pixels: model.low_resolution_queries(pixels.to(model.dtype), tower=low),
            see_high=lambda pixels: high(pixels.to(model.dtype).contiguous(memory_format=torch.channels_last)),
            mine=mine,
        ).image_tokens

    return call


def _by_encoder(backend: str) -> Provider:
    """The packed towers, as the pipeline runs them; in `decoded` the kernel resizes before."""

    def build(inputs: PixelInputs, graphs: bool = True) -> Call:
        encoder = make_encoder(inputs, backend, graphs)

        def call() -> torch.Tensor:
            with use_backend(backend):
                return encoder(**inputs.resize(backend))

        return call

    return Provider(build, own_graphs=True, without_graphs=lambda inputs: build(inputs, graphs=False))
