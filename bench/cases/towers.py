"""The two towers and the projector."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, CLIPVisionModel

from mg_fast import use_backend
from mg_fast.models.mini_gemini.vision import build_projector, low_resolution_features
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.modules.clip import PackedClip
from mg_fast.runtime import attention

from ..costs import floors
from ..costs.tower import Tower, tower_cost, tower_floor
from ..registry import Call, Case, NotHere, Provider
from .settings import (
    COMBINATIONS,
    DEPTHS,
    DIMS,
    LAYERS,
    LR,
    PATCHES,
    WIDTH,
    Setting,
    compiled,
    devices_of,
    require,
    within,
)

# CLIP ViT-L/14-336: the width of its MLP.
MLP = 4096
# The forms of torch's scaled_dot_product_attention. `reference` is the form that torch takes by itself.
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# The hidden size of the 7B model.
HIDDEN = 4096


@dataclass
class ModuleInputs:
    device: str
    module: nn.Module
    x: torch.Tensor


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        options = {"devices": devices_of(setting, batch, dtype), "capturable": batch == 1}
        for group, make_case in (("tower", _tower), ("clip", _clip), ("projector", _projector)):
            name = f"{group}/{setting.name}-b{batch}-{dtype}"
            found.append(make_case(name, setting, batch, getattr(torch, dtype), options))
    return found


def _make(
    make_module: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> ModuleInputs:
    """One module with random weights, and one input."""
    torch.manual_seed(0)
    # The weights are drawn on the device: 200 million random numbers take a CPU seconds.
    with torch.device(device):
        module = make_module().eval().to(dtype)
    return ModuleInputs(device, module, torch.randn(shape, device=device).to(dtype))


def _tower(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    sizes = Tower(dtype, batch, setting.side)
    providers = {
        "reference": _as_modules,
        "reference, channels last": _channels_last,
        **compiled(_channels_last, "reference, channels last"),
        "reference, native depthwise": _native_depthwise,
        **compiled(_as_modules, "reference"),
        "torch": Provider(partial(_packed_tower, "torch"), tower_cost(sizes, "torch")),
        **compiled(partial(_packed_tower, "torch"), "torch"),
        # By default this project's convolution and the library's products run.
        "auto": Provider(partial(_packed_tower, "auto"), tower_cost(sizes, "auto")),
        "triton": Provider(partial(_packed_tower, "triton"), tower_cost(sizes, "triton")),
    }
    make = partial(_make, random_tower, (batch, 3, setting.side, setting.side), dtype)
    return Case(name, make, providers, _exact_tower, least=tower_floor(sizes), stage="HR tower", **options)


def random_tower() -> ConvNeXtPyramid:
    """ConvNeXt-L in float32, with layer scales at which every block changes the map."""
    tower = ConvNeXtPyramid.from_dims(DIMS, DEPTHS)
    with torch.no_grad():
        for name, p in tower.named_parameters():
            if name.endswith("gamma"):
                # timm initialises layer scales to one in a million, with which the blocks would change nothing.
                p.uniform_(0.1, 0.5)
    return tower.eval()


def _exact_tower(inputs: ModuleInputs) -> list[torch.Tensor]:
    tower = copy.deepcopy(inputs.module).double()
    pictures = [tower(inputs.x[i : i + 1].double(), backend="reference") for i in range(len(inputs.x))]
    return [torch.cat(maps) for maps in zip(*pictures)]


def _as_modules(inputs: ModuleInputs) -> Call:
    return lambda: inputs.module(inputs.x, backend="reference")


def _channels_last(inputs: ModuleInputs) -> Call:
    tower = copy.deepcopy(inputs.module).to(memory_format=torch.channels_last)
    x = inputs.x.contiguous(memory_format=torch.channels_last)
    return lambda: tower(x, backend="reference")


def _native_depthwise(inputs: ModuleInputs) -> Call:
    """The modules with torch's own depthwise convolution in place of cuDNN's, where torch lets a caller choose."""
    if inputs.device != "cuda":
        raise NotHere("for GPUs")
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        raise NotHere(f"torch {torch.__version__} has no torch.backends.cudnn.depthwise_kernel")

    def call() -> list[torch.Tensor]:
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel="native"):
            return inputs.module(inputs.x, backend="reference")

    return call


def _packed_tower(backend: str, inputs: ModuleInputs) -> Call:
    if backend != "auto":
        require("high_resolution_tower", backend, inputs.device)
    # What is packed depends on whose products will run.
    with use_backend(backend):
        packed = inputs.module.pack()
    return lambda: packed(inputs.x, backend=backend)


def _clip(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    views = batch * setting.views
    least = floors.clip(_clip_config(), LAYERS - 1, views, dtype.itemsize)
    providers = {
        "reference": partial(_layers, "reference"),
        "reference, eager attention": partial(_attention, "eager"),
        "reference, flash attention": partial(_attention, attention.FLASH),
        **{f"reference, SDPA {name}": partial(_sdpa, backend) for name, backend in SDPA.items()},
        **compiled(partial(_layers, "reference"), "reference"),
        # This runs the modules without the last layer, whose output is not used.
        "23 layers": partial(_layers, "torch"),
        "packed": _packed_clip,
        **compiled(_packed_clip, "packed"),
    }
    make = partial(_make, lambda: CLIPVisionModel(_clip_config()), (views, 3, LR, LR), dtype)
    return Case(name, make, providers, _exact_clip, least=least, stage="LR tower", **options)


def _clip_config() -> CLIPVisionConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    return CLIPVisionConfig(image_size=LR, patch_size=14, **sizes)


def _exact_clip(inputs: ModuleInputs) -> torch.Tensor:
    tower = copy.deepcopy(inputs.module).double()
    return torch.cat([low_resolution_features(tower, view.double()[None], backend="reference") for view in inputs.x])


def _layers(backend: str, inputs: ModuleInputs) -> Call:
    return lambda: low_resolution_features(inputs.module, inputs.x, backend=backend)


def _attention(implementation: str, inputs: ModuleInputs) -> Call:
    if reason := attention.why_not(implementation, inputs.x.device, inputs.x.dtype):
        raise NotHere(reason)
    tower = copy.deepcopy(inputs.module)
    try:
        tower.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise NotHere(str(error).splitlines()[0]) from None
    return lambda: low_resolution_features(tower, inputs.x, backend="reference")


def _sdpa(backend: SDPBackend, inputs: ModuleInputs) -> Call:
    if inputs.device != "cuda":
        raise NotHere("it runs on GPUs only")
    return within(partial(sdpa_kernel, backend), partial(_layers, "reference"), inputs)


def _packed_clip(inputs: ModuleInputs) -> Call:
    packed = PackedClip.from_tower(inputs.module)
    return lambda: packed(inputs.x)


def _projector(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    rows = batch * setting.views * PATCHES**2
    least = floors.projector(rows, WIDTH, HIDDEN, dtype.itemsize)
    make = partial(_make, lambda: build_projector("mlp2x_gelu", WIDTH, HIDDEN), (rows, WIDTH), dtype)
    providers = {"reference": _call, **compiled(_call, "reference")}

    def exact(inputs: ModuleInputs) -> torch.Tensor:
        return copy.deepcopy(inputs.module).double()(inputs.x.double())

    return Case(name, make, providers, exact, least=least, stage="projector", **options)


def _call(inputs: ModuleInputs) -> Call:
    return lambda: inputs.module(inputs.x)
