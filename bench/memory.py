"""Memory, bytes moved, launches and FLOP of the published models, predicted without a GPU.

    python -m bench memory [--hd] [NAMES]

runs the reference and our forms at their real sizes on fake CUDA tensors, which have shapes and no values, and counts
at torch's dispatcher (bench.counting). What torch allocates is counted; what libraries allocate for themselves is not
seen (`LIBRARIES`).
"""

import functools
import json
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache

from mg_fast import ops, use_backend
from mg_fast.models.mini_gemini import modeling
from mg_fast.models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from mg_fast.models.mini_gemini.vision import low_resolution_features
from mg_fast.modules.clip import PackedClip
from mg_fast.ops.torch import patch_mining as mining_form
from mg_fast.testing.environment import environment
from mg_fast.testing.random_checkpoints import make_config

from . import records
from .cases.settings import DIMS, LR, PATCHES, PICTURE, SETTINGS, WIDTH, Setting
from .counting import Count
from .errors import BadRecord
from .registry import choose_names

PREDICTED = records.RESULTS / "predicted.json"
DTYPE = torch.bfloat16
TEXT_TOKENS = 64
# of mg_fast.ops.torch.patch_mining
TABLES = ("resize_matrix", "strip_tables", "window_tables")
# name of a whole model -> size and setting; the parts are those of the first of a setting
MODELS = {"7b": ("7b", SETTINGS[0]), "7b-hd": ("7b", SETTINGS[1]), "34b-hd": ("34b", SETTINGS[1])}
# 10^9 bytes of cards; those sold by 2^30 have 7 % more, which is left to the driver and the libraries
CARDS_GB = (16, 24, 40, 48, 80, 141)
LIBRARIES = """\
Not in it is what libraries take for themselves:
  cuBLAS      a workspace per handle and stream, twice for two streams: 8.1 MiB, on Hopper 32 MiB (torch, CublasHandlePool.cpp)
  cuBLASLt    for products with a bias: 1 to 4 MiB on Ampere, up to 32 MiB from compute capability 9.0 on (torch, CUDABlas.cpp)
  cuDNN       by convolution and algorithm: unknown
  context     CUDA's own and the kernels' code, outside of torch's figures: unknown
  allocator   up to 1 MiB a block that it does not split, and what it keeps but has not given out: two streams share no memory, and a CUDA
              graph keeps all that was allocated within it for as long as it lives"""


@dataclass(frozen=True)
class Prediction:
    """Of one call, in bytes where nothing else is said.

    Args:
        weights: parameters and packed copies of them.
        held: what the call leaves behind: its results, the language model's cache.
        peak: the most that is allocated at once beside weights and inputs; what is held is part of it.
        moved: read and written.
        launches: of kernels.
        flop: of products of matrices and convolutions.
    """

    weights: int
    held: int
    peak: int
    moved: int
    launches: int
    flop: int


# what must not grow
FIGURES = ("peak", "held", "moved", "launches", "flop", "weights")
Predictions = dict[str, dict[str, Prediction]]
# without arguments; the weights' bytes and the call
Provider = Callable[[], tuple[int, Callable[[], object]]]


def names() -> list[str]:
    """Of all cases, in order."""
    parts = [
        f"{part}/{setting.name}-b1-bfloat16"
        for part in ("clip", "tower", "patch_mining", "projector", "picture")
        for setting in SETTINGS
    ]
    return [
        *(f"dual_resize/{setting.name}-float32" for setting in SETTINGS),
        *parts,
        *(f"end-to-end/{model}-b1-bfloat16" for model in MODELS),
    ]


def predict(patterns: Sequence[str] = ()) -> Predictions:
    """Predictions by case and provider.

    Args:
        patterns: names, shell patterns or groups; none: all.

    Raises:
        UnknownCase: a pattern names no case.
    """
    chosen, found = choose_names(names(), patterns, "memory"), {}
    for model in MODELS:
        # one model at a time: modules of fake tensors are made in seconds
        providers = {name: provider for name, provider in _cases(model).items() if name in chosen}
        if providers:
            with FakeTensorMode(), _kept_tables():
                found |= {
                    name: {p: _predict(make) for p, make in make_all().items()} for name, make_all in providers.items()
                }
    return {name: found[name] for name in chosen}


def _predict(provider: Provider) -> Prediction:
    with torch.inference_mode():
        weights, call = provider()
        made = None
        while made != _tables_made():
            # they are made once, in a first call
            made = _tables_made()
            with Count("cuda") as count:
                out = call()
                held = count.live
                del out
    return Prediction(weights, held, count.peak, count.total.bytes, count.launches.total(), count.total.flop)


def _kept_tables():
    """Keeps tables of fake tensors, as those of a GPU are kept."""
    return unittest.mock.patch.multiple(
        mining_form, **{table: functools.cache(getattr(mining_form, table)) for table in TABLES}
    )


def _tables_made() -> int:
    return sum(getattr(mining_form, table).cache_info().misses for table in TABLES)


def empty_model(size: str, *, hd: bool) -> MiniGeminiForConditionalGeneration:
    """A published model on a GPU, in bfloat16 and without values; within FakeTensorMode on one that need not be there."""
    # fake numbers cannot be read, which timm's constructor does with real ones
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(make_config(size, hd=hd)).eval().to(DTYPE)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    tensors[name] = (
                        nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
                    )
    return model


def _cases(model_name: str) -> dict[str, Callable[[], dict[str, Provider]]]:
    """What makes the providers of the cases that need a model, by case."""
    size, setting = MODELS[model_name]
    made = functools.cache(lambda: _Picture(empty_model(size, hd=setting.grid > 1), setting))
    cases = {f"end-to-end/{model_name}-b1-bfloat16": lambda: _whole(made())}
    if model_name == next(name for name, (_, of) in MODELS.items() if of == setting):
        makers = {"clip": _clip, "tower": _tower, "patch_mining": _mining, "projector": _projector, "picture": _picture}
        cases |= {
            f"{part}/{setting.name}-b1-bfloat16": functools.partial(lambda make: make(made()), make)
            for part, make in makers.items()
        }
        cases[f"dual_resize/{setting.name}-float32"] = lambda: _preprocess(setting)
    return cases


class _Picture:
    """A model and empty tensors of one picture."""

    def __init__(self, model: MiniGeminiForConditionalGeneration, setting: Setting):
        self.model, self.setting, self.inner = model, setting, model.model
        side = setting.side // 4
        self.queries = _empty(1, setting.views, PATCHES**2, WIDTH)
        self.pyramid = [_empty(1, side >> s, side >> s, c) for s, c in enumerate(DIMS)]
        self.views = _empty(setting.views, 3, LR, LR)
        self.pixels = _empty(1, 3, setting.side, setting.side)

    @functools.cached_property
    def packed(self) -> tuple[int, PackedClip, object]:
        """Bytes of the copies, and the towers packed as mg_fast.models.mini_gemini.encoder does it."""
        # whose weights must not be inference tensors
        with torch.inference_mode(False), Count("cuda") as count:
            clip, tower = PackedClip.from_tower(self.inner.vision_tower), self.inner.vision_tower_aux.pack()
            return count.live, clip, tower


def _empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers in blocks of the allocator, shared ones once."""
    count = Count("cuda")
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    count.allocate(tensors)
    return count.live


def _preprocess(setting: Setting) -> dict[str, Provider]:
    return {"triton": lambda: (0, lambda: _resize(setting))}


def _resize(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """A camera's picture, copied to the GPU and resized there."""
    picture = _empty(PICTURE[1], PICTURE[0], 3, dtype=torch.uint8)
    sizes = dict(grid=setting.grid, global_view=setting.views > setting.grid**2)
    return ops.dual_resize(picture, setting.side, LR, **sizes, backend="triton")


def _clip(of: _Picture) -> dict[str, Provider]:
    tower = of.inner.vision_tower
    weights = weight_bytes(tower)

    def packed(backend: str) -> Provider:
        with Count("cuda") as count:
            clip = PackedClip.from_tower(tower)
        return lambda: (weights + count.live, lambda: clip(of.views, backend=backend))

    return {
        "reference": lambda: (weights, lambda: low_resolution_features(tower, of.views, backend="reference")),
        "torch": lambda: (weights, lambda: low_resolution_features(tower, of.views, backend="torch")),
        "auto": packed("auto"),
        "triton": packed("triton"),
    }


def _tower(of: _Picture) -> dict[str, Provider]:
    tower = of.inner.vision_tower_aux
    weights = weight_bytes(tower)

    def packed(backend: str) -> Provider:
        with Count("cuda") as count:
            pyramid = tower.pack()
        return lambda: (weights + count.live, lambda: pyramid(of.pixels, backend=backend))

    return {
        "reference": lambda: (weights, lambda: tower(of.pixels, backend="reference")),
        "torch": packed("torch"),
        "auto": packed("auto"),
        "triton": packed("triton"),
    }


def _mining(of: _Picture) -> dict[str, Provider]:
    mining = of.inner.patch_mining

    def by(backend: str) -> Provider:
        return lambda: (
            weight_bytes(mining),
            lambda: mining(of.queries, of.pyramid, grid=of.setting.grid, backend=backend),
        )

    return {backend: by(backend) for backend in ("reference", "torch", "triton")}


def _projector(of: _Picture) -> dict[str, Provider]:
    tokens = of.queries.flatten(1, 2)
    return {"reference": lambda: (weight_bytes(of.inner.mm_projector), lambda: of.inner.mm_projector(tokens))}


def _picture(of: _Picture) -> dict[str, Provider]:
    inner = of.inner
    weights = weight_bytes(inner.vision_tower, inner.vision_tower_aux, inner.patch_mining, inner.mm_projector)

    def by_packed(backend: str) -> Provider:
        return lambda: (weights + of.packed[0], lambda: _encode_packed(of, backend))

    return {
        "reference": lambda: (weights, lambda: _encode(of, "reference")),
        "torch": lambda: (weights, lambda: _encode(of, "torch")),
        "auto": by_packed("auto"),
        "triton": by_packed("triton"),
    }


def _encode(of: _Picture, backend: str) -> torch.Tensor:
    """A picture's image tokens by the model's own modules; its pixels come from a CPU, in float32."""
    setting = of.setting
    pixels = (
        _empty(1, setting.views, 3, LR, LR, dtype=torch.float32),
        _empty(1, 3, setting.side, setting.side, dtype=torch.float32),
    )
    # as a processor's results are converted to the model's dtype
    return of.inner.get_image_features(*(p.to(DTYPE) for p in pixels), backend=backend).pooler_output


def _encode_packed(of: _Picture, backend: str) -> torch.Tensor:
    """The same as the pipeline does it: resized on the GPU, by packed towers, here one after the other."""
    _, clip, tower = of.packed
    high, low = _resize(of.setting)
    with use_backend(backend):
        return of.inner.picture_features(
            low[None],
            high[None],
            see_low=lambda pixels: of.inner.low_resolution_queries(pixels, tower=clip),
            see_high=tower,
        ).image_tokens


def _whole(of: _Picture) -> dict[str, Provider]:
    """A picture and a prompt to the first token's logits."""
    weights = weight_bytes(of.model)

    def original(attention: str) -> Provider:
        def call():
            of.model.set_attn_implementation({"text_config": attention})
            hidden, cache = _prefill(of, _encode(of, "reference"))
            # of every position, and once more in float32
            return of.model.lm_head(hidden).float(), cache

        return lambda: (weights, call)

    def ours(backend: str) -> Provider:
        def call():
            of.model.set_attn_implementation({"text_config": "sdpa"})
            hidden, cache = _prefill(of, _encode_packed(of, backend))
            # as `generate` asks for it
            return of.model.lm_head(hidden[:, -1:]).float(), cache

        return lambda: (weights + of.packed[0], call)

    return {
        "original": original("eager"),
        "original, SDPA": original("sdpa"),
        "auto": ours("auto"),
        "triton": ours("triton"),
    }


def _prefill(of: _Picture, tokens: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """The language model's last hidden states [1, L, hidden] over a picture and TEXT_TOKENS tokens of text, and its
    cache.
    """
    language_model, length = of.inner.language_model, tokens.shape[1] + TEXT_TOKENS
    embedded = language_model.get_input_embeddings()(_empty(1, length, dtype=torch.int64))
    # which counts places, as fake numbers cannot be
    with unittest.mock.patch.object(modeling, "check_places", lambda *_: None):
        embedded = of.inner.splice(embedded, tokens, _empty(1, length, dtype=torch.int64))
    cache = DynamicCache(config=of.model.config.text_config)
    return language_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state, cache


def record(predictions: Predictions) -> dict:
    """What is kept of predictions, as JSON."""
    return {
        "versions": versions(),
        "cases": {
            name: {provider: asdict(p) for provider, p in providers.items()} for name, providers in predictions.items()
        },
    }


def versions() -> dict[str, str | None]:
    """Of what the predictions depend on."""
    stack = environment()
    return {package: stack[package] for package in ("torch", "triton", "transformers")}


def recorded() -> dict[str, dict[str, dict[str, int]]]:
    """Figures by case and provider as `record` keeps them.

    Raises:
        BadRecord: there is nothing, or it was made by other versions of what it depends on.
    """
    if not PREDICTED.exists():
        raise BadRecord(f"{PREDICTED} is missing: `python -m bench memory --save` writes it")
    document = json.loads(PREDICTED.read_text(encoding="utf-8"))
    if document["versions"] != versions():
        raise BadRecord(
            f"{PREDICTED.name} was recorded with {_named(document['versions'])}, here are {_named(versions())}"
        )
    return document["cases"]


def _named(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def differences(recorded: Mapping, predictions: Predictions) -> Iterator[str]:
    """A sentence for every figure that is not as recorded.

    Args:
        recorded: as `recorded` returns them.
        predictions: of some of the same cases.
    """
    for name, providers in predictions.items():
        for provider, prediction in providers.items():
            before, now = recorded.get(name, {}).get(provider), asdict(prediction)
            if before is None:
                yield f"{name}, {provider}: not recorded. `python -m bench memory --save` records it"
                continue
            for figure in FIGURES:
                if now[figure] != before[figure]:
                    change = f"{figure} {before[figure]:,} -> {now[figure]:,} ({now[figure] / max(before[figure], 1) - 1:+.2%})"
                    verdict = "got worse; if it must," if now[figure] > before[figure] else "got better: record it,"
                    yield f"{name}, {provider}: {change} {verdict} `python -m bench memory --save`"


def table(predictions: Predictions) -> str:
    """Predictions as plain text."""
    head = ("case", "provider", "weights GiB", "held MiB", "peak MiB", "GB moved", "launches", "GFLOP")
    rows = [
        (
            name,
            provider,
            f"{p.weights / 2**30:.2f}",
            f"{p.held / 2**20:.1f}",
            f"{p.peak / 2**20:.1f}",
            f"{p.moved / 1e9:.2f}",
            str(p.launches),
            f"{p.flop / 1e9:.1f}",
        )
        for name, providers in predictions.items()
        for provider, p in providers.items()
    ]
    return _columns([head, *rows])


def fit_table(predictions: Predictions) -> str:
    """Whether weights and peak of the whole models fit on common cards; empty where there are none among the
    predictions.
    """
    rows = [
        (
            name,
            provider,
            f"{(p.weights + p.peak) / 1e9:.1f}",
            *("yes" if p.weights + p.peak <= gb * 1e9 else "no" for gb in CARDS_GB),
        )
        for name, providers in predictions.items()
        if name.startswith("end-to-end/")
        for provider, p in providers.items()
    ]
    return _columns([("would it fit?", "provider", "GB", *(f"{gb} GB" for gb in CARDS_GB)), *rows]) if rows else ""


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as text, all but the first two columns flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )


def main(patterns: Sequence[str] = (), *, hd: bool = False, check: bool = False, save: bool = False) -> int:
    """Prints predictions; returns the exit status.

    Args:
        patterns: as of `predict`.
        hd: only those of the HD models.
        check: hold them against what is recorded.
        save: record them.

    Raises:
        BadRecord: what is recorded was made by other versions, or only a part is to be recorded.
    """
    if save and (patterns or hd):
        raise BadRecord("--save records the predictions of all cases: name none, and leave out --hd")
    chosen = choose_names(names(), patterns, "memory")
    chosen = [name for name in chosen if "-hd-" in name or name.endswith("-hd")] if hd else chosen
    predictions = predict(chosen) if chosen else {}
    print("\n\n".join(part for part in (table(predictions), fit_table(predictions), LIBRARIES) if part))
    if save:
        records.write(PREDICTED, record(predictions))
    if not check:
        return 0
    found = list(differences(recorded(), predictions))
    print("\n" + ("\n".join(found) or "as recorded"))
    return int(bool(found))
