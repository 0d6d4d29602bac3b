"""The two towers and the projector."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, CLIPVisionModel

from mg_fast.models.mini_gemini.vision import build_projector, low_resolution_features
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.modules.clip import PackedClip

from .. import accounting
from ..registry import Call, Case, Cost, NotHere
from .settings import COMBINATIONS, DEPTHS, DIMS, PATCHES, WIDTH, Setting, compiled, devices_of, own_graphs, require

# CLIP ViT-L/14-336: tokens of a view, layers of which the last but one is read, width of the MLP
TOKENS, LAYERS, MLP = PATCHES**2 + 1, 24, 4096
# of torch's scaled_dot_product_attention; what it takes by itself is `reference`
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# of the 7B model
HIDDEN = 4096


@dataclass
class ModuleInputs:
    device: str
    module: nn.Module
    x: torch.Tensor


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        name, options = f"{setting.name}-b{batch}-{dtype}", {"devices": devices_of(setting, batch, dtype)}
        found += [_tower(f"tower/{name}", setting, batch, getattr(torch, dtype), options)]
        found += [_clip(f"clip/{name}", setting, batch, getattr(torch, dtype), options)]
        found += [_projector(f"projector/{name}", setting, batch, getattr(torch, dtype), options)]
    return found


def _tower(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    def make(device: str) -> ModuleInputs:
        torch.manual_seed(0)
        # drawn there: 200 million random numbers take a CPU seconds
        with torch.device(device):
            tower = random_tower().to(dtype)
        return ModuleInputs(device, tower, torch.randn(batch, 3, setting.side, setting.side, device=device).to(dtype))

    sizes = accounting.Tower(dtype, batch, setting.side)
    work = {
        "torch": accounting.torch_tower(sizes),
        "auto": accounting.auto_tower(sizes),
        "triton": accounting.triton_tower(sizes),
    }
    providers = {
        "reference": _as_modules,
        "reference, channels last": _channels_last,
        **compiled(_channels_last, "reference, channels last"),
        "reference, native depthwise": _native_depthwise,
        **compiled(_as_modules, "reference"),
        "torch": _packed_tower("torch"),
        **compiled(_packed_tower("torch"), "torch"),
        # what runs where no backend is named: our convolution, the library's products
        "auto": _packed_tower("auto"),
        "triton": _packed_tower("triton"),
    }
    least = Cost(work["triton"].flop, accounting.tower_floor_bytes(sizes))
    options = options | {"capturable": batch == 1, "own_graphs": own_graphs(providers)}
    return Case(name, make, providers, _exact_tower, least=least, work=work, **options)


def random_tower() -> ConvNeXtPyramid:
    """ConvNeXt-L in float32, its blocks not idle."""
    tower = ConvNeXtPyramid.from_dims(DIMS, DEPTHS)
    with torch.no_grad():
        for name, p in tower.named_parameters():
            if name.endswith("gamma"):
                # timm begins with layer scales of one in a million, under which the blocks would do nothing
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
    """torch's own depthwise convolution in the place of cuDNN's, where torch lets one choose."""
    if inputs.device != "cuda":
        raise NotHere("for GPUs")
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        raise NotHere(f"torch {torch.__version__} has no torch.backends.cudnn.depthwise_kernel")

    def call() -> list[torch.Tensor]:
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel="native"):
            return inputs.module(inputs.x, backend="reference")

    return call


def _packed_tower(backend: str) -> Callable[[ModuleInputs], Call]:
    def make(inputs: ModuleInputs) -> Call:
        if backend != "auto":
            require("high_resolution_tower", backend, inputs.device)
        packed = inputs.module.pack()
        return lambda: packed(inputs.x, backend=backend)

    return make


def _clip(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    views = batch * setting.views

    def make(device: str) -> ModuleInputs:
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        with torch.device(device):
            clip = CLIPVisionModel(config).eval().to(dtype)
        return ModuleInputs(device, clip, torch.randn(views, 3, 336, 336, device=device).to(dtype))

    # products of 23 layers and their attention; weights, pictures and features once
    rows, layer = views * TOKENS, 4 * WIDTH * WIDTH + 2 * WIDTH * MLP
    flop = 23 * (2 * rows * layer + 4 * rows * TOKENS * WIDTH) + 2 * views * PATCHES**2 * 3 * 14**2 * WIDTH
    least = Cost(flop, (23 * layer + 3 * 336**2 * views + rows * WIDTH) * dtype.itemsize)
    providers = {
        "reference": _layers("reference"),
        "reference, eager attention": _attention("eager"),
        "reference, flash attention": _attention("flash_attention_2"),
        **{f"reference, SDPA {name}": _sdpa(backend) for name, backend in SDPA.items()},
        **compiled(_layers("reference"), "reference"),
        # the modules, without the last layer
        "23 layers": _layers("torch"),
        "packed": _packed_clip,
        **compiled(_packed_clip, "packed"),
    }
    options = options | {"capturable": batch == 1, "own_graphs": own_graphs(providers)}
    return Case(name, make, providers, _exact_clip, least=least, **options)


def _exact_clip(inputs: ModuleInputs) -> torch.Tensor:
    tower = copy.deepcopy(inputs.module).double()
    return torch.cat([low_resolution_features(tower, view.double()[None], backend="reference") for view in inputs.x])


def _layers(backend: str) -> Callable[[ModuleInputs], Call]:
    return lambda inputs: lambda: low_resolution_features(inputs.module, inputs.x, backend=backend)


def _attention(implementation: str) -> Callable[[ModuleInputs], Call]:
    def make(inputs: ModuleInputs) -> Call:
        tower = copy.deepcopy(inputs.module)
        try:
            tower.set_attn_implementation(implementation)
        except (ImportError, ValueError) as error:
            raise NotHere(str(error).splitlines()[0]) from None
        return lambda: low_resolution_features(tower, inputs.x, backend="reference")

    return make


def _sdpa(backend: SDPBackend) -> Callable[[ModuleInputs], Call]:
    def make(inputs: ModuleInputs) -> Call:
        if inputs.device != "cuda":
            raise NotHere("for GPUs")

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return low_resolution_features(inputs.module, inputs.x, backend="reference")

        return call

    return make


def _packed_clip(inputs: ModuleInputs) -> Call:
    packed = PackedClip.from_tower(inputs.module)
    return lambda: packed(inputs.x)


def _projector(name: str, setting: Setting, batch: int, dtype: torch.dtype, options: dict) -> Case:
    rows = batch * setting.views * PATCHES**2

    def make(device: str) -> ModuleInputs:
        torch.manual_seed(0)
        with torch.device(device):
            projector = build_projector("mlp2x_gelu", WIDTH, HIDDEN).to(dtype)
        return ModuleInputs(device, projector, torch.randn(rows, WIDTH, device=device).to(dtype))

    weights = WIDTH * HIDDEN + HIDDEN * HIDDEN
    least = Cost(2 * rows * weights, (weights + rows * (WIDTH + HIDDEN)) * dtype.itemsize)
    providers = {"reference": _call, **compiled(_call, "reference")}
    options = options | {"capturable": batch == 1, "own_graphs": own_graphs(providers)}
    return Case(
        name,
        make,
        providers,
        lambda inputs: copy.deepcopy(inputs.module).double()(inputs.x.double()),
        least=least,
        **options,
    )


def _call(inputs: ModuleInputs) -> Call:
    return lambda: inputs.module(inputs.x)
