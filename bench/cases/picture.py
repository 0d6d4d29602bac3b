"""A picture's whole way to image tokens."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from mg_fast import use_backend
from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.models.mini_gemini.modeling import MiniGeminiModel
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.runtime.meter import Meter

from ..registry import Call, Case, Provider
from .settings import COMBINATIONS, Setting, devices_of, picture, require

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
    device: str
    model: MiniGeminiModel
    processor: MiniGeminiImageProcessor
    picture: Image.Image


def cases() -> list[Case]:
    return [picture_case(setting, dtype) for setting, batch, dtype in COMBINATIONS if batch == 1]


def picture_case(setting: Setting, dtype: str) -> Case:
    """A picture of this size in this dtype."""

    def make(device: str) -> PictureInputs:
        model = make_model(setting, dtype, device)
        return PictureInputs(device, model, MiniGeminiImageProcessor.from_config(model.config), picture())

    def exact(inputs: PictureInputs) -> torch.Tensor:
        return exact_tokens(inputs.model, inputs.processor(inputs.picture).to(inputs.device))

    reference = _by_model("reference")
    providers = {
        "reference": Provider(reference, stages=_stages(reference)),
        "torch": _by_model("torch"),
        "auto": _by_encoder("auto", stages=True),
        "triton": _by_encoder("triton"),
    }
    return Case(f"picture/{setting.name}-b1-{dtype}", make, providers, exact, devices=devices_of(setting, 1, dtype))


def make_model(setting: Setting, dtype: str, device: str) -> MiniGeminiModel:
    """A model of a picture size with random weights, whose language model is next to nothing."""
    hd = setting.grid > 1
    sizes = {"image_size_aux": setting.side, "image_grid": setting.grid, "image_global": hd}
    torch.manual_seed(0)
    with torch.device(device):
        return MiniGeminiModel(MiniGeminiConfig(**sizes, **SMALL_LANGUAGE_MODEL)).eval().to(getattr(torch, dtype))


def exact_tokens(model: MiniGeminiModel, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Image tokens by the same weights in float64.

    In HD the original's mining would need 13 GB in float64. This project's form of it, which the tests hold against the
    original's, stands in for it there.
    """
    backend = "torch" if model.config.image_grid > 1 else "reference"
    pixels = {name: value.double() for name, value in pixels.items()}
    return copy.deepcopy(model).double().get_image_features(**pixels, backend=backend).pooler_output


def _stages(build: Callable[[PictureInputs], Call]) -> Callable[[PictureInputs], list[dict]]:
    """The medians of three calls, or of as many as are made in half a minute; memory of the first."""

    def measured(inputs: PictureInputs) -> list[dict]:
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

    return measured


def _by_model(backend: str) -> Callable[[PictureInputs], Call]:
    """The model's own modules, as transformers runs them."""

    def build(inputs: PictureInputs) -> Call:
        def call(stage: Callable = contextlib.nullcontext) -> torch.Tensor:
            with use_backend(backend):
                with stage("preprocess"):
                    pixels = inputs.processor(inputs.picture).to(inputs.device)
                return inputs.model.get_image_features(**pixels, stage=stage).pooler_output

        return call

    return build


def _by_encoder(backend: str, *, stages: bool = False) -> Provider:
    """The packed towers, as the pipeline runs them: on a CPU Pillow resizes, on a GPU the kernel."""

    def build(inputs: PictureInputs, graphs: bool = True) -> Call:
        encoder = make_encoder(inputs, backend, graphs)
        device = inputs.device if inputs.device == "cuda" else None

        def call(stage: Callable | None = None) -> torch.Tensor:
            with use_backend(backend):
                with (stage or contextlib.nullcontext)("preprocess"):
                    pixels = inputs.processor(inputs.picture, device=device).to(inputs.device)
                # Where nobody asks for the stages, they are one graph on a GPU.
                return encoder(**pixels, stage=stage)

        return call

    return Provider(
        build,
        stages=_stages(build) if stages else None,
        own_graphs=True,
        without_graphs=lambda inputs: build(inputs, graphs=False),
    )


def make_encoder(inputs, backend: str, graphs: bool) -> PictureEncoder:
    """The encoder of the pipeline for a case's model; raises NotHere where the backend cannot run."""
    if backend != "auto":
        require("high_resolution_tower", backend, inputs.device)
    with torch.enable_grad():
        return PictureEncoder(inputs.model, graphs=graphs)
