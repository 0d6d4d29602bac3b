"""From pixels that are on the device already to image tokens: what a GPU does for a picture, without the host's part.

`pixels` starts from the resized and normalised tensors that the towers take. `decoded` starts from the decoded picture
as a camera took it, on the device. The original resizes on the host only, so in `decoded` its steps get our resizing in
plain PyTorch; its own is in the group `picture`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mg_fast import ops, use_backend
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.models.mini_gemini.modeling import MiniGeminiModel
from mg_fast.models.mini_gemini.vision import low_resolution_features

from ..registry import Call, Case
from .picture import make_model
from .settings import COMBINATIONS, LR, Setting, devices_of, own_graphs, picture, require


@dataclass
class PixelInputs:
    """A model, and pictures by the names of its arguments: `pixel_values` and `pixel_values_hr`, or one decoded
    `picture`.
    """

    device: str
    model: MiniGeminiModel
    resize: Callable[[str], dict[str, torch.Tensor]]


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        if batch == 1:
            devices = devices_of(setting, batch, dtype)
            found += [
                _case(f"{group}/{setting.name}-b1-{dtype}", setting, dtype, devices) for group in ("pixels", "decoded")
            ]
    return found


def _case(name: str, setting: Setting, dtype: str, devices: tuple[str, ...]) -> Case:
    decoded = name.startswith("decoded")

    def make(device: str) -> PixelInputs:
        # a copy, as Pillow's own memory cannot be written to
        pixels = torch.from_numpy(np.array(picture())).to(device)

        def resize(backend: str) -> dict[str, torch.Tensor]:
            sizes = dict(
                hr_size=setting.side, lr_size=LR, grid=setting.grid, global_view=setting.views > setting.grid**2
            )
            hr, views = ops.dual_resize(pixels, **sizes, backend=backend)
            return {"pixel_values": views[None], "pixel_values_hr": hr[None]}

        resized = None if decoded else resize("torch")
        return PixelInputs(device, make_model(setting, dtype, device), resize if decoded else lambda backend: resized)

    def exact(inputs: PixelInputs) -> torch.Tensor:
        # the original's mining in float64 would need 13 GB in HD: there our form of it, which the tests hold against
        # the original's
        wide = copy.deepcopy(inputs.model).double()
        return _features(
            wide,
            {key: value.double() for key, value in inputs.resize("torch").items()},
            "torch" if setting.grid > 1 else "reference",
        )

    providers = {
        "reference": _by_model("reference"),
        "reference, channels last, compiled": _compiled_parts,
        "torch": _by_model("torch"),
        "auto": _by_encoder("auto"),
        "triton": _by_encoder("triton"),
    }
    # on a GPU the encoder replays graphs of its own, in which nothing is allocated
    memory = {"auto": _by_encoder("auto", graphs=False), "triton": _by_encoder("triton", graphs=False)}
    return Case(
        name,
        make,
        providers,
        exact,
        devices=tuple(device for device in devices if device == "cuda"),
        # in plain PyTorch a resize copies its tables from the host, which cannot be captured
        capturable=not decoded,
        own_graphs=own_graphs(providers) | frozenset(memory),
        memory=memory,
        profiled={"auto": providers["auto"]},
    )


def _features(model: MiniGeminiModel, pixels: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    return model.get_image_features(**pixels, backend=backend).pooler_output


def _by_model(backend: str) -> Callable[[PixelInputs], Call]:
    """The model's own modules, as transformers runs them."""
    return lambda inputs: lambda: _features(inputs.model, inputs.resize("torch"), backend)


def _compiled_parts(inputs: PixelInputs) -> Call:
    """The strongest plain form: channels-last towers, and every part through torch.compile. Captured, it is one CUDA
    graph.

    Parts are compiled one by one, as whole towers are what a compiler can fuse in; what it made of a tower before is
    found in its cache.
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


def _by_encoder(backend: str, *, graphs: bool = True) -> Callable[[PixelInputs], Call]:
    """The packed towers, as the pipeline runs them; in `decoded` the kernel resizes before."""

    def build(inputs: PixelInputs) -> Call:
        if backend != "auto":
            require("high_resolution_tower", backend, inputs.device)
        with torch.enable_grad():
            encoder = PictureEncoder(inputs.model, graphs=graphs)

        def call() -> torch.Tensor:
            with use_backend(backend):
                return encoder(**inputs.resize(backend))

        return call

    return build
