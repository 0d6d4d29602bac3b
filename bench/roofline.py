"""Where time must go, from shapes: FLOP, bytes and the least time of every stage of an answer on a GPU that need not be
here.

A stage's floor is the larger of its FLOP at the rate of matrix products and of its bytes (inputs, weights and outputs
once) at the rate of a copy. Stages follow one another, so floors add up. FLOP are counted as in bench.accounting,
attention by its causal half.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from mg_fast import MiniGeminiConfig
from mg_fast.testing.random_checkpoints import PUBLISHED_TOWERS, SIZES, make_config

from . import accounting, records
from .cases.settings import PICTURE
from .errors import BadRecord, UnknownName
from .registry import Ceilings, Cost


@dataclass(frozen=True)
class Gpu:
    """What its maker promises of a GPU.

    Args:
        memory_gb: 1e9 bytes.
        sheet: dense rates, no sparsity; of float32 without TF32.
        reached: what one such card was seen to reach, where it was; None: never measured.
    """

    name: str
    memory_gb: float
    sheet: Ceilings
    reached: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """What was reached; the data sheet's where nothing was measured."""
        if self.reached is None:
            return self.sheet
        return replace(self.reached, matmul_tflops={**self.sheet.matmul_tflops, **self.reached.matmul_tflops})


def _sheet(gbps: float, half: float, single: float) -> Ceilings:
    return Ceilings(gbps, {"bfloat16": half, "float16": half, "float32": single})


GPUS = {
    # NVIDIA A100 Tensor Core GPU datasheet, SXM
    "a100-40": Gpu("NVIDIA A100 SXM 40 GB", 40, _sheet(1555, 312, 19.5)),
    "a100-80": Gpu("NVIDIA A100 SXM 80 GB", 80, _sheet(2039, 312, 19.5)),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM; its 1979 TFLOP/s are with sparsity
    "h100": Gpu("NVIDIA H100 SXM", 80, _sheet(3350, 989, 67)),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM. Reached: a copy and a bfloat16 product, measured on one card
    "h200": Gpu("NVIDIA H200", 141, _sheet(4800, 989, 67), Ceilings(4300, {"bfloat16": 790, "float16": 790})),
    # NVIDIA DGX B200 datasheet, an eighth of it; float32 from the Blackwell architecture brief, HGX B200
    "b200": Gpu("NVIDIA B200", 180, _sheet(8000, 2250, 80)),
    # NVIDIA L40S datasheet
    "l40s": Gpu("NVIDIA L40S", 48, _sheet(864, 362, 91.6)),
    # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090; products that accumulate in float32
    "4090": Gpu("NVIDIA GeForce RTX 4090", 24, _sheet(1008, 165.2, 82.6)),
}
MODELS = tuple(
    size + suffix for size, (_, _, towers) in SIZES.items() if towers is PUBLISHED_TOWERS for suffix in ("", "-hd")
)
DTYPES = ("bfloat16", "float16", "float32")


def find_gpu(name: str) -> Gpu:
    """One of GPUS.

    Raises:
        UnknownName: there is none of that name.
    """
    if name not in GPUS:
        raise UnknownName(f"no GPU is called {name!r}: expected one of {', '.join(GPUS)}")
    return GPUS[name]


def ridge(ceilings: Ceilings, dtype: str) -> float:
    """FLOP per byte at which both rates hold a program back alike; infinite where the rate of products is unknown."""
    return 1e3 * ceilings.matmul_tflops.get(dtype, math.inf) / ceilings.copy_gbps


@dataclass(frozen=True)
class StageCost:
    """A part of an answer: what it takes at least, and what it is called in the meter's tables."""

    name: str
    cost: Cost

    def floor_ms(self, ceilings: Ceilings, dtype: str) -> float:
        return ceilings.floor_ms(self.cost, dtype) or 0.0

    def bound(self, ceilings: Ceilings, dtype: str) -> str:
        """What the floor is made of: "compute" or "bandwidth"."""
        return "compute" if self.intensity > ridge(ceilings, dtype) else "bandwidth"

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.cost.flop / self.cost.bytes


@dataclass(frozen=True)
class ModelledAnswer:
    """An answer about one picture, by a published model; a batch of such at once.

    Args:
        model: one of MODELS.
        dtype: of weights, activations and KV cache.
        text_tokens: of the prompt, beside the picture's.
        new_tokens: of the answer.

    Raises:
        UnknownName: no such model or dtype.
    """

    model: str
    dtype: str = "bfloat16"
    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 128

    def __post_init__(self):
        if self.model not in MODELS:
            raise UnknownName(f"no model is called {self.model!r}: expected one of {', '.join(MODELS)}")
        if self.dtype not in DTYPES:
            raise UnknownName(f"no dtype is called {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        for name in ("batch", "text_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UnknownName(f"{name}: expected a whole number above 0, got {getattr(self, name)}")

    @cached_property
    def config(self) -> MiniGeminiConfig:
        return make_config(self.model.removesuffix("-hd"), hd=self.model.endswith("-hd"))

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def views(self) -> int:
        return self.config.image_grid**2 + self.config.image_global

    @property
    def patches(self) -> int:
        """Along a side of a view."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def image_tokens(self) -> int:
        return self.views * self.patches**2

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def mining(self) -> accounting.Sizes:
        aux, levels = self.config.vision_config_aux, range(len(self.config.vision_config_aux["dims"]))
        maps = tuple((self.config.image_size_aux // 4 >> s, aux["dims"][s]) for s in levels)
        return accounting.Sizes(
            getattr(torch, self.dtype),
            self.batch,
            self.config.image_grid,
            self.views,
            self.patches,
            self.config.mm_hidden_size,
            maps,
        )

    @property
    def tower(self) -> accounting.Tower:
        aux = self.config.vision_config_aux
        return accounting.Tower(
            getattr(torch, self.dtype), self.batch, self.config.image_size_aux, tuple(aux["dims"]), tuple(aux["depths"])
        )

    @cached_property
    def stages(self) -> list[StageCost]:
        """Up to the first token, by the names of the meter's stages."""
        return [
            StageCost("preprocess", preprocess_cost(self)),
            StageCost("LR tower", clip_cost(self)),
            StageCost(
                "HR tower", Cost(accounting.triton_tower(self.tower).flop, accounting.tower_floor_bytes(self.tower))
            ),
            StageCost(
                "patch info mining",
                Cost(accounting.torch_mining(self.mining).flop, accounting.floor_bytes(self.mining)),
            ),
            StageCost("projector", projector_cost(self)),
            StageCost("prefill to first token", prefill_cost(self)),
        ]

    @cached_property
    def decode(self) -> StageCost:
        """One step of the answer, in the middle of it."""
        return StageCost("decode, a token", decode_cost(self, self.prompt_tokens + self.new_tokens // 2))

    @cached_property
    def original_mining(self) -> Cost:
        """Of the original's own steps."""
        return accounting.reference_mining(self.mining)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model, the last layer of CLIP included, as a checkpoint holds it."""
        return self.itemsize * sum(parameters(self.config).values())

    @property
    def cache_bytes(self) -> int:
        """KV cache at the answer's end."""
        return self.batch * (self.prompt_tokens + self.new_tokens) * cache_bytes_per_token(self.config, self.itemsize)

    def first_token_ms(self, ceilings: Ceilings) -> float:
        return sum(stage.floor_ms(ceilings, self.dtype) for stage in self.stages)

    def tokens_per_second(self, ceilings: Ceilings) -> float:
        """Of the whole batch."""
        return self.batch * 1e3 / self.decode.floor_ms(ceilings, self.dtype)


def parameters(config: MiniGeminiConfig) -> dict[str, int]:
    """Parameters by part of the model."""
    clip, tower, text = config.vision_config, config.vision_config_aux, config.text_config
    d, channels, hidden = config.mm_hidden_size, sum(tower["dims"]), text.hidden_size
    patch = clip.num_channels * clip.patch_size**2 * clip.hidden_size
    tokens = (clip.image_size // clip.patch_size) ** 2 + 1
    layer = _clip_layer(config) + (9 * clip.hidden_size + clip.intermediate_size)
    # layer scale is a parameter of its own in a checkpoint, and so are the norms
    sizes = accounting.Tower(torch.float32, dims=tuple(tower["dims"]), depths=tuple(tower["depths"]))
    scales = sum(depth * c for c, depth in zip(tower["dims"], tower["depths"]))
    text_layer = sum(_text_layer(text).values()) + 2 * hidden
    return {
        "LR tower": patch + (tokens + 1 + 4) * clip.hidden_size + clip.num_hidden_layers * layer,
        "HR tower": sizes.weights + scales,
        "patch info mining": (2 * d + d * d + d) + 2 * (2 * channels + channels * d + d),
        "projector": d * hidden + hidden + hidden * hidden + hidden,
        "language model": text.num_hidden_layers * text_layer
        + hidden
        + text.vocab_size * hidden * (1 if text.tie_word_embeddings else 2),
    }


def _clip_layer(config: MiniGeminiConfig) -> int:
    """Weights of the products of a layer of CLIP."""
    clip = config.vision_config
    return 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size


def _head(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _text_layer(text) -> dict[str, int]:
    """Weights of the products of a layer of the language model: attention, router, and all experts (of a dense model
    its only one).
    """
    experts = getattr(text, "num_local_experts", 1)
    attention = 2 * text.hidden_size * _head(text) * (text.num_attention_heads + text.num_key_value_heads)
    router = text.hidden_size * experts if experts > 1 else 0
    return {
        "attention": attention,
        "router": router,
        "experts": experts * 3 * text.hidden_size * text.intermediate_size,
    }


def _experts_used(text, tokens: int) -> tuple[float, float]:
    """What part of the experts' weights a token multiplies, and what part so many tokens read where each goes its own
    way.
    """
    experts = getattr(text, "num_local_experts", 1)
    part = text.num_experts_per_tok / experts if experts > 1 else 1
    return part, 1 - (1 - part) ** tokens


def cache_bytes_per_token(config: MiniGeminiConfig, itemsize: int) -> int:
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * _head(text) * itemsize


def preprocess_cost(answer: ModelledAnswer) -> Cost:
    """A camera's 8-bit picture to the float32 tensors of both towers."""
    lr, hr = answer.config.vision_config.image_size, answer.config.image_size_aux
    return Cost(0, 3 * PICTURE[0] * PICTURE[1], accounting.FLOAT32 * 3 * (hr**2 + answer.views * lr**2)) * answer.batch


def clip_cost(answer: ModelledAnswer) -> Cost:
    """CLIP up to the layer that is read, its weights once."""
    clip, e = answer.config.vision_config, answer.itemsize
    views, patches = answer.batch * answer.views, answer.patches**2
    rows, layers = views * (patches + 1), clip.num_hidden_layers + 1 + answer.config.mm_vision_select_layer
    embedding = clip.num_channels * clip.patch_size**2 * clip.hidden_size
    flop = (
        layers * (2 * rows * _clip_layer(answer.config) + 4 * rows * (patches + 1) * clip.hidden_size)
        + 2 * views * patches * embedding
    )
    read = layers * _clip_layer(answer.config) + embedding + clip.num_channels * clip.image_size**2 * views
    return Cost(flop, e * read, e * views * patches * clip.hidden_size)


def projector_cost(answer: ModelledAnswer) -> Cost:
    d, hidden, e = answer.config.mm_hidden_size, answer.config.text_config.hidden_size, answer.itemsize
    rows, weights = answer.batch * answer.image_tokens, d * hidden + hidden * hidden
    return Cost(2 * rows * weights, e * (weights + rows * d), e * rows * hidden)


def _body_cost(answer: ModelledAnswer, rows: int, pairs: int) -> Cost:
    """All layers over so many tokens, each layer over so many pairs of queries and keys; the cache is written."""
    text, e = answer.config.text_config, answer.itemsize
    layer, (multiplied, read) = _text_layer(text), _experts_used(text, rows)
    dense = layer["attention"] + layer["router"]
    flop = 2 * rows * (dense + round(multiplied * layer["experts"])) + 4 * pairs * text.num_attention_heads * _head(
        text
    )
    weights = e * (dense + round(read * layer["experts"]))
    return Cost(flop, weights, 0) * text.num_hidden_layers + Cost(0, 0, rows * cache_bytes_per_token(answer.config, e))


def _head_cost(answer: ModelledAnswer) -> Cost:
    """The logits of one token per sequence."""
    weight = answer.config.text_config.hidden_size * answer.config.text_config.vocab_size
    return Cost(
        2 * answer.batch * weight,
        answer.itemsize * weight,
        answer.itemsize * answer.batch * answer.config.text_config.vocab_size,
    )


def prefill_cost(answer: ModelledAnswer) -> Cost:
    """The prompt through the language model, logits of its last token; causal attention by half of its square."""
    rows = answer.batch * answer.prompt_tokens
    return _body_cost(answer, rows, rows * answer.prompt_tokens // 2) + _head_cost(answer)


def decode_cost(answer: ModelledAnswer, context: int) -> Cost:
    """One token per sequence, each reading a cache of so many tokens."""
    cache = answer.batch * context * cache_bytes_per_token(answer.config, answer.itemsize)
    return _body_cost(answer, answer.batch, answer.batch * context) + Cost(0, cache, 0) + _head_cost(answer)


# ---- beside measurements


def measured_stages(rows: Sequence[Mapping], answer: ModelledAnswer) -> dict[str, tuple[float, str]]:
    """Of a benchmark's rows the fastest right one of each stage: milliseconds, and the provider's name."""
    setting = f"{answer.config.image_size_aux}{'-hd' if answer.model.endswith('-hd') else ''}"
    cases = {
        "preprocess": f"dual_resize/{setting}-float32",
        "LR tower": f"clip/{setting}-b{answer.batch}-{answer.dtype}",
        "HR tower": f"tower/{setting}-b{answer.batch}-{answer.dtype}",
        "patch info mining": f"patch_mining/{setting}-b{answer.batch}-{answer.dtype}",
    }
    if answer.config.text_config.hidden_size == 4096:
        # the width that the projector is measured at
        cases["projector"] = f"projector/{setting}-b{answer.batch}-{answer.dtype}"
    best = {}
    for stage, name in cases.items():
        times = [
            (row["median_ms"], row["provider"])
            for row in rows
            if row["name"] == name and row["ok"] and row["median_ms"]
        ]
        if times:
            best[stage] = min(times)
    # of a whole answer what no case of its own measures
    for row in rows:
        if (
            row["name"] == f"end-to-end/{answer.model}-first-token-b{answer.batch}-{answer.dtype}"
            and row["ok"] is not False
        ):
            for stage in row.get("stages") or ():
                if stage["name"] == answer.stages[-1].name:
                    found = stage["ms"], row["provider"]
                    best[stage["name"]] = min(best.get(stage["name"], found), found)
    return best


def recorded_ceilings(document: Mapping) -> Ceilings | None:
    """Those that a document was measured under; None where it holds none."""
    ceilings = document.get("ceilings")
    return Ceilings(ceilings["copy_gbps"], ceilings["matmul_tflops"]) if ceilings else None


def table(gpu_name: str, answer: ModelledAnswer, measured: Path | None = None) -> str:
    """The roofline of an answer on a GPU as text.

    Args:
        measured: a document, or a folder of them, whose ceilings and times stand beside the floors.

    Raises:
        UnknownName: no such GPU.
        BadRecord: the documents are none, or were not measured on a GPU.
    """
    gpu = find_gpu(gpu_name)
    ceilings, source, times = gpu.ceilings, "the data sheet's, which no program reaches", {}
    if gpu.reached is not None:
        source = "reached on one card"
    if measured is not None:
        document = records.read(measured)
        if document.get("device") != "cuda" or (recorded := recorded_ceilings(document)) is None:
            raise BadRecord(
                f"{measured}: expected documents measured on a GPU, with their ceilings; --measured needs such"
            )
        ceilings, source, times = recorded, f"measured on {document['gpu']}", measured_stages(document["cases"], answer)
        if answer.dtype not in ceilings.matmul_tflops:
            raise BadRecord(
                f"{measured}: no ceiling of {answer.dtype} products among {', '.join(ceilings.matmul_tflops)}"
            )
    total, dtype = answer.first_token_ms(ceilings), answer.dtype
    lines = [
        f"{gpu.name}, {answer.model} in {dtype}, batch {answer.batch}: "
        f"{answer.image_tokens} image and {answer.text_tokens} text tokens, {answer.new_tokens} new ones",
        f"rates, {source}: {ceilings.copy_gbps / 1e3:.2f} TB/s, {ceilings.matmul_tflops[dtype]:.0f} TFLOP/s of {dtype} products",
        "",
        f"{'stage':<24}{'GFLOP':>11}{'MB':>11}{'FLOP/B':>9}{'floor ms':>10}{'bound':>11}{'share':>7}"
        + f"{'measured':>10}" * bool(times),
    ]
    for stage in [*answer.stages, answer.decode]:
        floor = stage.floor_ms(ceilings, dtype)
        line = f"{stage.name:<24}{_figure(stage.cost.flop / 1e9):>11}{_figure(stage.cost.bytes / 1e6):>11}{stage.intensity:>9.1f}"
        line += f"{floor:>10.3f}{stage.bound(ceilings, dtype):>11}{f'{floor / total:.1%}' if stage in answer.stages else '-':>7}"
        lines.append(line + (f"{times[stage.name][0]:>10.3f} {times[stage.name][1]}" if stage.name in times else ""))
    original = answer.original_mining
    products, copies = original.flop / ceilings.matmul_tflops[dtype] / 1e9, original.bytes / ceilings.copy_gbps / 1e6
    held = (answer.weight_bytes + answer.cache_bytes) / 1e9
    room = gpu.memory_gb - held
    lines += [
        "",
        f"mining by the original's steps: {original.flop / 1e9:.0f} GFLOP and {original.bytes / 1e9:.1f} GB, "
        f"{max(products, copies):.2f} ms where products and copies overlap, {products + copies:.2f} ms where they take turns",
        f"time to first token: at least {total:.1f} ms, "
        f"{total - answer.stages[-1].floor_ms(ceilings, dtype):.1f} ms of which are the picture's way to tokens",
        f"decode: at most {answer.tokens_per_second(ceilings):.0f} tokens/s"
        + (" of the whole batch" if answer.batch > 1 else ""),
        f"memory: weights {answer.weight_bytes / 1e9:.1f} GB, KV cache {answer.cache_bytes / 1e9:.2f} GB: "
        + (
            f"fits into {gpu.memory_gb:g} GB, {room:.1f} GB are left for what a call makes on the way"
            if room > 0
            else f"DOES NOT FIT into {gpu.memory_gb:g} GB, {-room:.1f} GB are missing"
        ),
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
