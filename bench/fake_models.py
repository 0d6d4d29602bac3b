"""The published models on a GPU that need not be here: their parts as calls on fake tensors, which have shapes alone.

Everything here is to be made and called within FakeTensorMode.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from mg_fast import ops, use_backend
from mg_fast.models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from mg_fast.models.mini_gemini.vision import low_resolution_features
from mg_fast.models.protocol import CACHE
from mg_fast.modules.clip import PackedClip
from mg_fast.ops.torch.bilinear_tables import resize_matrix, strip_tables, window_tables
from mg_fast.testing.random_checkpoints import make_config

from .cases.settings import DIMS, LR, PATCHES, PICTURE, SETTINGS, WIDTH, Setting
from .counting import Count

DTYPE = torch.bfloat16
TEXT_TOKENS = 64
# Functions that make tables of patch info mining once.
TABLES = (resize_matrix, strip_tables, window_tables)
# The size and the setting of each whole model. The parts are those of the first model of a setting.
MODELS = {"7b": ("7b", SETTINGS[0]), "7b-hd": ("7b", SETTINGS[1]), "34b-hd": ("34b", SETTINGS[1])}


Model = TypeVar("Model", bound=nn.Module)


class FakeCall(NamedTuple):
    """A way to compute a case: the bytes of its weights and packed copies of them, and the call."""

    weights: int
    call: Callable[[], object]


def empty_model(size: str, *, hd: bool) -> MiniGeminiForConditionalGeneration:
    """A published model on a GPU, in bfloat16 and without values."""
    # timm's constructor reads numbers, which fake tensors do not have.
    with unset_fake_temporarily(), torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(make_config(size, hd=hd)).eval().to(DTYPE)
    return on_gpu(model)


def on_gpu(model: Model) -> Model:
    """A model of the meta device, whose parameters and buffers become fake tensors on a GPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return model


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers in blocks of the allocator, shared ones once."""
    count = Count("cuda")
    count.allocate([t for module in modules for t in (*module.parameters(), *module.buffers())])
    return count.live


class FakePicture:
    """One picture of a setting as empty tensors, and the model that sees it, made when it is first needed."""

    def __init__(self, size: str, setting: Setting):
        self.size, self.setting = size, setting
        side = setting.side // 4
        self.queries = empty(1, setting.views, PATCHES**2, WIDTH)
        self.pyramid = [empty(1, side >> s, side >> s, c) for s, c in enumerate(DIMS)]
        self.views = empty(setting.views, 3, LR, LR)
        self.pixels = empty(1, 3, setting.side, setting.side)

    @functools.cached_property
    def model(self) -> MiniGeminiForConditionalGeneration:
        return empty_model(self.size, hd=self.setting.grid > 1)

    @functools.cached_property
    def clip(self) -> tuple[int, Callable]:
        """Bytes that the packed low-resolution tower holds beside the weights, and the tower."""
        return held_by(lambda: PackedClip.from_tower(self.model.model.vision_tower))

    @functools.cached_property
    def tower(self) -> tuple[int, Callable]:
        """Bytes that the packed high-resolution tower holds beside the weights, and the tower."""
        return held_by(self.model.model.vision_tower_aux.pack)

    @functools.cached_property
    def tower_for_kernels(self) -> tuple[int, Callable]:
        """The same, packed for our kernels of its products."""
        with use_backend("triton"):
            return held_by(self.model.model.vision_tower_aux.pack)

    def packed_tower(self, backend: str) -> tuple[int, Callable]:
        """The packed tower that a backend runs."""
        return self.tower_for_kernels if backend == "triton" else self.tower


def held_by(make: Callable[[], Callable]) -> tuple[int, Callable]:
    with Count("cuda") as count:
        made = make()
    return count.live, made


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _providers(weights: int, call: Callable[[str], object], *backends: str) -> dict[str, FakeCall]:
    """A provider for each backend, which the call is given."""
    return {backend: FakeCall(weights, functools.partial(call, backend)) for backend in backends}


def _resize(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """A camera's picture, copied to the GPU and resized there."""
    picture = empty(PICTURE[1], PICTURE[0], 3, dtype=torch.uint8)
    return ops.dual_resize(picture, **setting.resize, backend="triton")


def _preprocess(of: FakePicture) -> dict[str, FakeCall]:
    return {"triton": FakeCall(0, lambda: _resize(of.setting))}


def _clip(of: FakePicture) -> dict[str, FakeCall]:
    module, (held, packed) = of.model.model.vision_tower, of.clip

    def plain(backend: str) -> torch.Tensor:
        return low_resolution_features(module, of.views, backend=backend)

    def by_packed(backend: str) -> torch.Tensor:
        return packed(of.views, backend=backend)

    weights = weight_bytes(module)
    return _providers(weights, plain, "reference", "torch") | _providers(weights + held, by_packed, "auto", "triton")


def _tower(of: FakePicture) -> dict[str, FakeCall]:
    module = of.model.model.vision_tower_aux

    def plain(backend: str) -> list[torch.Tensor]:
        return module(of.pixels, backend=backend)

    def by_packed(backend: str) -> list[torch.Tensor]:
        return of.packed_tower(backend)[1](of.pixels, backend=backend)

    found = _providers(weight_bytes(module), plain, "reference")
    for backend in ("torch", "auto", "triton"):
        found |= _providers(weight_bytes(module) + of.packed_tower(backend)[0], by_packed, backend)
    return found


def _mining(of: FakePicture) -> dict[str, FakeCall]:
    module = of.model.model.patch_mining

    def mine(backend: str) -> torch.Tensor:
        return module(of.queries, of.pyramid, grid=of.setting.grid, backend=backend)

    return _providers(weight_bytes(module), mine, "reference", "torch", "triton")


def _projector(of: FakePicture) -> dict[str, FakeCall]:
    module, tokens = of.model.model.mm_projector, of.queries.flatten(1, 2)
    return {"reference": FakeCall(weight_bytes(module), lambda: module(tokens))}


def _picture(of: FakePicture) -> dict[str, FakeCall]:
    inner = of.model.model
    weights = weight_bytes(inner.vision_tower, inner.vision_tower_aux, inner.patch_mining, inner.mm_projector)
    found = _providers(weights, functools.partial(_encode, of), "reference", "torch")
    return found | _packed_providers(of, weights, functools.partial(_encode_packed, of))


def _packed_providers(of: FakePicture, weights: int, call: Callable[[str], object]) -> dict[str, FakeCall]:
    """Providers that run both packed towers, which are held beside the weights."""
    found = {}
    for backend in ("auto", "triton"):
        found |= _providers(weights + of.clip[0] + of.packed_tower(backend)[0], call, backend)
    return found


def _encode(of: FakePicture, backend: str) -> torch.Tensor:
    """The image tokens of a picture by the model's own modules; its pixels come from a CPU, in float32."""
    views, side = of.setting.views, of.setting.side
    pixels = empty(1, views, 3, LR, LR, dtype=torch.float32), empty(1, 3, side, side, dtype=torch.float32)
    # The results of a processor are converted to the model's dtype.
    return of.model.model.get_image_features(*(p.to(DTYPE) for p in pixels), backend=backend).pooler_output


def _encode_packed(of: FakePicture, backend: str) -> torch.Tensor:
    """The image tokens as the pipeline makes them: resized on the GPU, by packed towers, here one after the other."""
    inner, (high, low) = of.model.model, _resize(of.setting)
    with use_backend(backend):
        return inner.picture_features(
            low[None],
            high[None],
            see_low=lambda pixels: inner.low_resolution_queries(pixels, tower=of.clip[1]),
            see_high=of.packed_tower(backend)[1],
        ).image_tokens


def _whole(of: FakePicture) -> dict[str, FakeCall]:
    """A picture and a prompt to the first token's logits."""
    model = of.model

    def original(attention: str) -> tuple[torch.Tensor, DynamicCache]:
        hidden, cache = _prefill(of, attention, _encode(of, "reference"))
        # The logits of every position are made, and once more in float32.
        return model.lm_head(hidden).float(), cache

    def ours(backend: str) -> tuple[torch.Tensor, DynamicCache]:
        hidden, cache = _prefill(of, "sdpa", _encode_packed(of, backend))
        # `generate` asks for the logits of the last position alone.
        return model.lm_head(hidden[:, -1:]).float(), cache

    weights = weight_bytes(model)
    found = {"original": FakeCall(weights, lambda: original("eager"))}
    found["original, SDPA"] = FakeCall(weights, lambda: original("sdpa"))
    return found | _packed_providers(of, weights, ours)


def _prefill(of: FakePicture, attention: str, tokens: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """The language model's last hidden states [1, L, hidden] over a picture and a text, and its cache."""
    of.model.set_attn_implementation({"text_config": attention})
    inner, length = of.model.model, tokens.shape[1] + TEXT_TOKENS
    embedded = inner.language_model.get_input_embeddings()(empty(1, length, dtype=torch.int64))
    embedded = inner.splice(embedded, tokens, empty(1, length, dtype=torch.int64), checked=False)
    cache = DynamicCache(config=of.model.config.text_config)
    return inner.language_model(inputs_embeds=embedded, use_cache=True, **{CACHE: cache}).last_hidden_state, cache


_PARTS = {"clip": _clip, "tower": _tower, "patch_mining": _mining, "projector": _projector, "picture": _picture}


def subjects() -> dict[str, Callable[[], FakePicture]]:
    """What cases are about, by the name of the whole model."""
    return {name: functools.partial(FakePicture, *of) for name, of in MODELS.items()}


def cases() -> dict[str, tuple[str, Callable[[FakePicture], dict[str, FakeCall]]]]:
    """By name the subject of a case, and what makes its providers; parts take the first model of their setting."""
    first = {setting: model for model, (_, setting) in reversed(MODELS.items())}
    found = {f"dual_resize/{of.name}-float32": (first[of], _preprocess) for of in SETTINGS}
    found |= {f"{part}/{of.name}-b1-bfloat16": (first[of], make) for part, make in _PARTS.items() for of in SETTINGS}
    return found | {f"end-to-end/{model}-b1-bfloat16": (model, _whole) for model in MODELS}
