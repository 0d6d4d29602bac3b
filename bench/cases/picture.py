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

from ..registry import Call, Case
from .settings import COMBINATIONS, Setting, devices_of, picture, require

# image tokens are as wide as those of a 7B model, which itself is not run
SMALL_LANGUAGE_MODEL = {
    "model_type": "mgm",
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "mm_projector_type": "mlp2x_gelu",
}


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        if batch == 1:
            found.append(
                _picture_to_tokens(
                    f"picture/{setting.name}-b1-{dtype}", setting, dtype, devices_of(setting, batch, dtype)
                )
            )
    return found


@dataclass
class Model:
    device: str
    model: MiniGeminiModel
    processor: MiniGeminiImageProcessor
    picture: Image.Image


def make_model(setting: Setting, dtype: str, device: str) -> MiniGeminiModel:
    """A model of a picture size with random weights, whose language model is next to nothing."""
    hd = setting.grid > 1
    config = MiniGeminiConfig(
        image_size_aux=setting.side, image_grid=setting.grid, image_global=hd, **SMALL_LANGUAGE_MODEL
    )
    torch.manual_seed(0)
    with torch.device(device):
        return MiniGeminiModel(config).eval().to(getattr(torch, dtype))


def _picture_to_tokens(name: str, setting: Setting, dtype: str, devices: tuple[str, ...]) -> Case:
    hd = setting.grid > 1

    def make(device: str) -> Model:
        model = make_model(setting, dtype, device)
        return Model(device, model, MiniGeminiImageProcessor.from_config(model.config), picture())

    def exact(inputs: Model) -> torch.Tensor:
        # the original's mining in float64 would need 13 GB in HD: there our form of it, which the tests hold against
        # the original's
        with use_backend("torch" if hd else "reference"):
            pixels = inputs.processor(inputs.picture).to(inputs.device)
            wide = copy.deepcopy(inputs.model).double()
            return wide.get_image_features(**{key: value.double() for key, value in pixels.items()}).pooler_output

    providers = {
        "reference": _by_model("reference"),
        "torch": _by_model("torch"),
        "auto": _by_encoder_with("auto"),
        "triton": _by_encoder_with("triton"),
    }
    stages = {provider: _stages(providers[provider]) for provider in ("reference", "auto")}
    # on a GPU the encoder replays graphs, which allocate nothing
    memory = {"auto": _by_encoder_with("auto", graphs=False), "triton": _by_encoder_with("triton", graphs=False)}
    return Case(
        name, make, providers, exact, devices=devices, stages=stages, own_graphs=frozenset(memory), memory=memory
    )


def _stages(build: Callable[[Model], Call]) -> Callable[[Model], list[dict]]:
    """Medians of three calls, or as many as are made in half a minute; memory of the first."""

    def measured(inputs: Model) -> list[dict]:
        call, calls, began = build(inputs), [], time.perf_counter()
        while len(calls) < 3 and (not calls or time.perf_counter() - began < 30):
            meter = Meter(inputs.device)
            call(stage=meter.stage)
            calls.append(meter.stages)
        return [
            {
                "name": same[0].name,
                "ms": 1e3 * statistics.median(stage.seconds for stage in same),
                "peak_mib": same[0].peak_mib,
            }
            for same in zip(*calls)
        ]

    return measured


def _by_model(backend: str):
    """The model's own modules, as transformers runs them."""

    def build(inputs: Model) -> Call:
        def call(stage: Callable = contextlib.nullcontext) -> torch.Tensor:
            with use_backend(backend):
                with stage("preprocess"):
                    pixels = inputs.processor(inputs.picture).to(inputs.device)
                return inputs.model.get_image_features(**pixels, stage=stage).pooler_output

        return call

    return build


def _by_encoder_with(backend: str, *, graphs: bool = True):
    """The packed towers, as the pipeline runs them: on a CPU Pillow resizes, on a GPU the kernel."""

    def build(inputs: Model) -> Call:
        if backend != "auto":
            require("high_resolution_tower", backend, inputs.device)
        with torch.enable_grad():
            encoder = PictureEncoder(inputs.model, graphs=graphs)
        device = inputs.device if inputs.device == "cuda" else None

        def call(stage: Callable | None = None) -> torch.Tensor:
            with use_backend(backend):
                with (stage or contextlib.nullcontext)("preprocess"):
                    pixels = inputs.processor(inputs.picture, device=device).to(inputs.device)
                # without a context for them the stages are one graph on a GPU
                return encoder(**pixels, stage=stage)

        return call

    return build
