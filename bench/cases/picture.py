"""From a picture to its image tokens, beginning at three different places.

`picture` starts from the photograph on the host. `decoded` starts from its decoded pixels on the device, and `pixels`
from the resized and normalised tensors that the towers take: what a GPU does for a picture, without the host's part.
The original resizes on the host only. In `decoded` its steps therefore get this project's resizing in plain PyTorch;
its own resizing is in the group `picture`.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mg_fast import ops, use_backend
from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.models.mini_gemini.modeling import MiniGeminiModel
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.mini_gemini.vision import low_resolution_features
from mg_fast.runtime.meter import Meter

from ..registry import Call, Case, Provider
from .settings import COMBINATIONS, Setting, devices_of, picture, picture_pixels, require

# Image tokens are as wide as those of a 7B model; the language model itself is not run.
SMALL_LANGUAGE_MODEL = {
    "model_type": "mgm",
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "mm_projector_type": "mlp2x_gelu",
}


@dataclass
class PictureInputs:
    """A model and a picture.

    Attributes:
        pixels: makes the model's arguments `pixel_values` and `pixel_values_hr` of the picture: for None as the
            original does, or by this project's resizing, with this backend.
    """

    device: str
    model: MiniGeminiModel
    pixels: Callable[[str | None], dict[str, torch.Tensor]]


def cases() -> list[Case]:
    chosen = [(setting, dtype) for setting, batch, dtype in COMBINATIONS if batch == 1]
    found = [picture_case("picture", *one) for one in chosen]
    return found + [picture_case(group, *one) for one in chosen for group in ("pixels", "decoded")]


def picture_case(group: str, setting: Setting, dtype: str) -> Case:
    """A picture of this size in this dtype, from where its group starts."""
    devices, reference = devices_of(setting, 1, dtype), partial(_by_model, "reference")
    providers = {"reference": Provider(reference, stages=partial(_stages, reference))}
    if group != "picture":
        devices = tuple(device for device in devices if device == "cuda")
        providers = {"reference": reference, "reference, channels last, compiled": _compiled_parts}
    providers |= {
        "torch": partial(_by_model, "torch"),
        "auto": _by_encoder("auto", stages=group == "picture", profiled=group != "picture"),
        "triton": _by_encoder("triton"),
    }
    return Case(
        f"{group}/{setting.name}-b1-{dtype}",
        lambda device: _make(group, setting, dtype, device),
        providers,
        _exact,
        devices=devices,
        # In plain PyTorch a resize copies its tables from the host, which cannot be captured.
        capturable=group == "pixels",
    )


def _make(group: str, setting: Setting, dtype: str, device: str) -> PictureInputs:
    config = MiniGeminiConfig(
        image_size_aux=setting.side, image_grid=setting.grid, image_global=setting.grid > 1, **SMALL_LANGUAGE_MODEL
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = MiniGeminiModel(config).eval().to(getattr(torch, dtype))
    if group == "picture":
        processor, photo = MiniGeminiImageProcessor.from_config(config), picture()

        def process(backend: str | None) -> dict[str, torch.Tensor]:
            # Pillow resizes on the host. On a GPU this project's kernel can take its place.
            by_kernel = backend is not None and device == "cuda"
            return processor(photo, device=device if by_kernel else None).to(device)

        return PictureInputs(device, model, process)

    decoded = picture_pixels(device)

    def resize(backend: str | None) -> dict[str, torch.Tensor]:
        hr, views = ops.dual_resize(decoded, **setting.resize, backend=backend or "torch")
        return {"pixel_values": views[None], "pixel_values_hr": hr[None]}

    resized = None if group == "decoded" else resize(None)
    return PictureInputs(device, model, resize if resized is None else lambda backend: resized)


def _exact(inputs: PictureInputs) -> torch.Tensor:
    """Image tokens by the same weights in float64.

    In HD the original's mining would need 13 GB in float64. This project's form of it, which the tests hold against the
    original's, stands in for it there.
    """
    backend = "torch" if inputs.model.config.image_grid > 1 else "reference"
    pixels = {name: value.double() for name, value in inputs.pixels(None).items()}
    return copy.deepcopy(inputs.model).double().get_image_features(**pixels, backend=backend).pooler_output


def _stages(build: Callable[[PictureInputs], Call], inputs: PictureInputs) -> list[dict]:
    """The medians of three calls, or of as many as are made in half a minute; memory of the first."""
    call, calls, began = build(inputs), [], time.perf_counter()
    while len(calls) < 3 and (not calls or time.perf_counter() - began < 30):
        meter = Meter(inputs.device)
        call(stage=meter.stage)
        calls.append(meter.stages)
    found = []
    for same in zip(*calls):
        ms = 1e3 * statistics.median(stage.seconds for stage in same)
        found.append({"name": same[0].name, "ms": ms, "peak_mib": same[0].peak_mib})
    return found


def _by_model(backend: str, inputs: PictureInputs) -> Call:
    """The model's own modules, as transformers runs them."""

    def call(stage: Callable = contextlib.nullcontext) -> torch.Tensor:
        with use_backend(backend):
            with stage("preprocess"):
                pixels = inputs.pixels(None)
            return inputs.model.get_image_features(**pixels, stage=stage).pooler_output

    return call


def _compiled_parts(inputs: PictureInputs) -> Call:
    """The strongest plain form: channels-last towers, and every part through torch.compile; one CUDA graph if captured.

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
            **inputs.pixels(None),
            see_low=lambda pixels: model.low_resolution_queries(pixels.to(model.dtype), tower=low),
            see_high=lambda pixels: high(pixels.to(model.dtype).contiguous(memory_format=torch.channels_last)),
            mine=mine,
        ).image_tokens

    return call


def _by_encoder(backend: str, *, stages: bool = False, profiled: bool = False) -> Provider:
    """The packed towers, as the pipeline runs them."""

    def build(inputs: PictureInputs, graphs: bool = True) -> Call:
        if backend != "auto":
            require("high_resolution_tower", backend, inputs.device)
        with torch.enable_grad(), use_backend(backend):
            encoder = PictureEncoder(inputs.model, graphs=graphs)

        def call(stage: Callable | None = None) -> torch.Tensor:
            with use_backend(backend):
                with (stage or contextlib.nullcontext)("preprocess"):
                    pixels = inputs.pixels(backend)
                # Without a `stage`, the stages are captured as one CUDA graph on a GPU.
                return encoder(**pixels, stage=stage)

        return call

    return Provider(
        build,
        stages=partial(_stages, build) if stages else None,
        profiled=build if profiled else None,
        own_graphs=True,
        without_graphs=partial(build, graphs=False),
    )
