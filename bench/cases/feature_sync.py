"""MM-Interleaved's feature synchronizer at its real sizes, with the products around its core.

The original projects a copy of the query for every picture, and the features of all pictures in every call. The packed
form keeps the pictures' values, which are made before the call that is timed; a provider with `values each call`
makes them within it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.modules import FeatureSynchronizer

from ..costs.sampling import BLOCKS, LANGUAGE, SyncSizes, block_sizes, reference_sync_flop, sync_floor
from ..registry import DTYPES, Call, Case, Cost, Provider, dtype_name
from .operations import POWERS, Launch, Tunable, forms
from .settings import compiled
from .synchronizer_blocks import (
    SynchronizerBlock,
    map_of,
    packed_block,
    packed_values,
    pixel_centres,
    synchronizer,
)

# Pictures of a decoding step; of a prompt and its tokens.
DECODING, PROMPTS = (1, 4, 8), ((512, 4), (512, 8), (2048, 4), (2048, 8))
# Elements of all samples of the queries of which the exact result is made at once.
SAMPLES_TOGETHER = 2**26


def cases() -> list[Case]:
    found = []
    for dtype in DTYPES:
        language = replace(LANGUAGE, dtype=getattr(torch, dtype))
        for batch, pictures in [(1, n) for n in DECODING] + [(8, 4)]:
            sizes = replace(language, batch=batch, pictures=pictures)
            found.append(language_case(f"feature_sync/llm-decode-n{pictures}-b{batch}-{dtype}", sizes))
        for queries, pictures in PROMPTS:
            sizes = replace(language, queries=queries, pictures=pictures)
            found.append(language_case(f"feature_sync/llm-prefill{queries}-n{pictures}-b1-{dtype}", sizes))
        for name, (side, width, _) in BLOCKS.items():
            sizes = block_sizes(side, width, getattr(torch, dtype))
            found.append(blocks_case(f"feature_sync/{name}-b1-{dtype}", [sizes]))
        every = [[block_sizes(side, width, getattr(torch, dtype))] * count for side, width, count in BLOCKS.values()]
        found.append(blocks_case(f"feature_sync/unet-all-b1-{dtype}", sum(every, [])))
    return found


@dataclass
class LanguageInputs:
    device: str
    module: FeatureSynchronizer
    query: torch.Tensor
    features: torch.Tensor
    points: torch.Tensor
    mask: torch.Tensor


def language_case(name: str, sizes: SyncSizes) -> Case:
    """The module at one layer of the language model, without the norms and the gate around it."""
    own = forms("feature_sync", _unpacked)
    kept = forms("feature_sync", partial(_packed, True))
    each = forms("feature_sync", partial(_packed, False))
    return Case(
        name,
        lambda device: _language_inputs(sizes, device),
        _providers([sizes], own, kept, each),
        _language_exact,
        least=sync_floor(sizes),
        devices=_devices([sizes]),
        capturable=sizes.batch == 1,
    )


# Builders of calls by backend.
Forms = dict[str, Callable]


def _providers(every: list[SyncSizes], own: Forms, kept: Forms, each: Forms) -> dict[str, Provider]:
    """The module's own forms, and its packed ones with values that were kept and with those of each call."""
    least = _floor(every)
    found = {"reference": Provider(own["reference"]), **compiled(own["reference"], "reference")}
    # The reference makes a tensor of the levels' sizes on the host in every call.
    found = {name: replace(provider, capturable=False) for name, provider in found.items()}
    for backend in (name for name in kept if name != "reference"):
        if backend == "torch":
            found |= compiled(kept[backend], backend)
        found[backend] = Provider(kept[backend], least)
        found[f"{backend}, values each call"] = Provider(each[backend])
        found[f"{backend}, not packed"] = Provider(own[backend])
    return found


def _floor(every: list[SyncSizes]) -> Cost:
    return sum((sync_floor(sizes) for sizes in every), Cost())


def _devices(every: list[SyncSizes]) -> tuple[str, ...]:
    """A CPU takes many seconds for the original's steps over a long prompt."""
    small = all(sizes.dtype == torch.float32 and sizes.batch == 1 for sizes in every)
    return ("cpu", "cuda") if small and sum(map(reference_sync_flop, every)) < 2e11 else ("cuda",)


def _language_inputs(sizes: SyncSizes, device: str) -> LanguageInputs:
    torch.manual_seed(0)
    like = {"dtype": sizes.dtype, "device": device}
    batch, pictures, queries = sizes.batch, sizes.pictures, sizes.queries
    query = torch.randn(batch, queries, sizes.width, **like)
    features = torch.randn(batch, pictures, sizes.pixels, sizes.features, **like)
    if queries == 1:
        # The rows of a batch have from one picture to all of them.
        seen = torch.arange(batch, device=device) % pictures + 1 if batch > 1 else torch.full((1,), pictures)
        seen = seen.to(device)[:, None, None]
    else:
        # The pictures are spread over the prompt, and a token sees those before it.
        seen = torch.arange(queries, device=device)[:, None] * pictures // queries + 1
    mask = (torch.arange(pictures, device=device) < seen).expand(batch, queries, pictures)
    points = torch.full((1, 1, 1, 2), 0.5, device=device)
    return LanguageInputs(device, synchronizer(sizes, **like), query, features, points, mask)


def _unpacked(inputs: LanguageInputs, backend: str) -> Call:
    return lambda: inputs.module(inputs.query, inputs.features, inputs.points, inputs.mask, backend=backend)


def _packed(keeps: bool, inputs: LanguageInputs, backend: str) -> Call:
    """The packed form with the values and the indices of all pictures kept from before the call, or made in it."""
    packed = inputs.module.pack()
    if not keeps:
        return lambda: packed(inputs.query, packed.values(inputs.features), inputs.points, inputs.mask, backend=backend)
    values, index = packed.values(inputs.features), packed.index(inputs.mask)
    return lambda: packed(inputs.query, values, inputs.points, index=index, backend=backend)


def _language_exact(inputs: LanguageInputs) -> torch.Tensor:
    return _exact(inputs.module, inputs.query, inputs.features, inputs.points, inputs.mask)


def _exact(
    module: FeatureSynchronizer,
    query: torch.Tensor,
    features: torch.Tensor,
    points: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The original's steps in float64, for as many queries at once as have few enough samples."""
    module, features = copy.deepcopy(module).double(), features.double()
    sizes = module.sizes
    samples = features.shape[1] * len(sizes.spatial_shapes) * sizes.points * sizes.inner
    together = max(1, SAMPLES_TOGETHER // samples)
    parts = []
    for start in range(0, query.shape[1], together):
        part = slice(start, start + together)
        of_part = points[:, part] if points.shape[1] > 1 else points
        seen = None if mask is None else mask[:, part]
        parts.append(module(query[:, part].double(), features, of_part, seen, backend="reference"))
    return torch.cat(parts, 1)


@dataclass
class BlocksInputs:
    device: str
    blocks: list[SynchronizerBlock]
    maps: list[torch.Tensor]
    points: list[torch.Tensor]
    features: torch.Tensor


def blocks_case(name: str, every: list[SyncSizes]) -> Case:
    """Blocks of the diffusion decoder, each over a map of its own, which all read the same picture."""
    return Case(
        name,
        lambda device: _blocks_inputs(every, device),
        _providers(
            every,
            forms("feature_sync", _blocks),
            forms("feature_sync", partial(_packed_blocks, True)),
            forms("feature_sync", partial(_packed_blocks, False)),
        ),
        _blocks_exact,
        least=_floor(every),
        devices=_devices(every),
        capturable=every[0].batch == 1,
    )


def _blocks_inputs(every: list[SyncSizes], device: str) -> BlocksInputs:
    torch.manual_seed(0)
    like = {"dtype": every[0].dtype, "device": device}
    blocks = [SynchronizerBlock(sizes, **like) for sizes in every]
    maps = [torch.randn(sizes.batch, sizes.width, sizes.side, sizes.side, **like) for sizes in every]
    points = [pixel_centres(sizes.side, device) for sizes in every]
    features = torch.randn(every[0].batch, every[0].pictures, every[0].pixels, every[0].features, **like)
    return BlocksInputs(device, blocks, maps, points, features)


def _blocks(inputs: BlocksInputs, backend: str) -> Call:
    each = list(zip(inputs.blocks, inputs.maps, inputs.points))
    return lambda: [block(map, inputs.features, points, backend=backend) for block, map, points in each]


def _packed_blocks(keeps: bool, inputs: BlocksInputs, backend: str) -> Call:
    packed = [block.pack() for block in inputs.blocks]
    index = torch.ones(inputs.features.shape[:2], dtype=torch.int64, device=inputs.features.device)

    def values() -> list[torch.Tensor]:
        return [packed_values(one, inputs.features) for one in packed]

    def call() -> list[torch.Tensor]:
        each = zip(packed, inputs.maps, kept or values(), inputs.points)
        return [packed_block(one, map, value, points, index, backend) for one, map, value, points in each]

    kept = values() if keeps else None
    return call


def _blocks_exact(inputs: BlocksInputs) -> list[torch.Tensor]:
    """The original's steps in float64."""
    found = []
    for block, map, points in zip(inputs.blocks, inputs.maps, inputs.points):
        wide, map = copy.deepcopy(block).double(), map.double()
        read = _exact(wide.mmfs, wide.queries(map), wide.feat_norm(inputs.features.double()), points)
        found.append(map + wide.conv(map_of(read)))
    return found


# Two levels of 5 x 5 and 2 x 2 pixels, three pictures, and four queries of two heads with 16 channels and two points.
SMALL_LEVELS, SMALL_HEADS, SMALL_POINTS, SMALL_CHANNELS = [(5, 5), (2, 2)], 2, 2, 16


def launches() -> dict[str, Launch]:
    """The core alone: its kernel, and the gradients, which the form in PyTorch computes with torch's own atomics."""
    return {
        "feature_sync": Launch(_small, _forward),
        "feature_sync, gradients": Launch(_small, _gradients, repeatable=False),
    }


def _small(dtype: torch.dtype) -> list[torch.Tensor]:
    """Values, queries, the table, the ignored token, a gradient of the result, reference points and indices."""
    width, pixels = SMALL_HEADS * SMALL_POINTS * (2 + len(SMALL_LEVELS)), sum(h * w for h, w in SMALL_LEVELS)
    channels = SMALL_HEADS * SMALL_CHANNELS
    shapes = (2, 3, pixels, SMALL_HEADS, SMALL_CHANNELS), (2, 4, width), (5, width), (channels,), (2, 4, channels)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    # One query sees no picture, and one sees a picture between two that it does not see.
    index = torch.tensor([[3, 2, 1], [0, 0, 0], [0, 1, 0], [2, 0, 1]]).expand(2, 4, 3).contiguous()
    return [*tensors, torch.rand(2, 4, 2), index]


def _forward(tensors: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    values, queries, table, ignore, _, points, index = tensors
    options = {"base": 4, "ignore": ignore, "backend": backend}
    return [ops.feature_sync(values, queries, table, index, points, SMALL_LEVELS, **options)]


def _gradients(tensors: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    *inputs, gradient, points, index = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    [out] = _forward([*inputs, gradient, points, index], backend)
    return list(torch.autograd.grad(out, inputs, gradient))


def tunable() -> Tunable:
    space = {"slots": POWERS[3:9], "channels": POWERS[3:7], "times": POWERS[:4], "share": POWERS[1:5]}
    return Tunable(space, _fits, _problems)


@dataclass
class CoreInputs:
    device: str
    values: torch.Tensor
    queries: torch.Tensor
    table: torch.Tensor
    index: torch.Tensor
    points: torch.Tensor


def _problems() -> list[tuple[object, Case]]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        language = replace(LANGUAGE, dtype=dtype, pictures=4)
        named = {"llm-decode-n4": language, "llm-prefill512-n4": replace(language, queries=512)}
        named |= {name: block_sizes(*BLOCKS[name][:2], dtype) for name in ("unet-16", "unet-64")}
        for name, sizes in named.items():
            channels = sizes.inner // sizes.heads
            strides = sizes.pictures * sizes.pixels * sizes.inner, sizes.pixels * sizes.inner, sizes.inner, channels
            key = configs.feature_sync_bucket(dtype.itemsize, sizes.batch * sizes.queries, channels, strides)
            found.append((key, _core_case(f"feature_sync/{name}-b1-{dtype_name(dtype)}", sizes)))
    return found


def _core_case(name: str, sizes: SyncSizes) -> Case:
    """The kernel alone, without the products around it."""

    def make(device: str) -> CoreInputs:
        torch.manual_seed(0)
        like = {"dtype": sizes.dtype, "device": device}
        channels, width = sizes.inner // sizes.heads, sizes.offsets + sizes.logits
        values = torch.randn(sizes.batch, sizes.pictures, sizes.pixels, sizes.heads, channels, **like)
        # Offsets are a few units long, as those of new weights are.
        queries = torch.randn(sizes.batch, sizes.queries, width, **like) * 2
        table = torch.randn(sizes.relations, width, **like) / 4
        index = torch.arange(sizes.pictures, 0, -1, device=device).expand(sizes.batch, 1, sizes.pictures)
        points = (
            pixel_centres(sizes.side, device)[:, :, 0] if sizes.block else torch.full((1, 1, 2), 0.5, device=device)
        )
        return CoreInputs(device, values, queries, table, index, points)

    def call(inputs: CoreInputs, backend: str) -> torch.Tensor:
        tensors = inputs.values, inputs.queries, inputs.table, inputs.index, inputs.points
        return ops.feature_sync(*tensors, sizes.shapes, base=sizes.base, backend=backend)

    def exact(inputs: CoreInputs) -> torch.Tensor:
        wide = [tensor.double() for tensor in (inputs.values, inputs.queries, inputs.table)]
        return call(CoreInputs(inputs.device, *wide, inputs.index, inputs.points), "torch")

    providers = {backend: lambda inputs, b=backend: lambda: call(inputs, b) for backend in ("torch", "triton")}
    return Case(name, make, providers, exact, baseline="torch")


def _fits(key: tuple, tile: configs.SyncSlots, shared: int) -> bool:
    # The launch takes 1 to 8 warps. A thread adds up its share of every time's channels.
    warps = tile.slots * tile.channels // (32 * tile.share)
    return 1 <= warps <= 8 and tile.channels * tile.times <= 64 and tile.times * tile.share <= 32
