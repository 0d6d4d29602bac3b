"""Deformable attention at the shapes of detectors and of MM-Interleaved's vision adapter (see `costs.sampling`)."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch

from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.ops.deformable_attention import deformable_attention_backward

from ..costs.sampling import SAMPLERS, SamplingSizes, deformable_floor, deformable_training_floor
from ..registry import DTYPES, Call, Case, Provider, dtype_name
from . import samplers
from .operations import MOST_REGISTERS, POWERS, Launch, Tunable, forms
from .settings import compiled, deterministic, within

# The batches of 8 that are measured, and the training step, whose memory others publish.
IN_EIGHTS = ("detr-encoder", "rt-detr")
TRAINING = "detr-encoder-training"
# Queries of which the exact result is made at once: all samples of an encoder in float64 would not fit everywhere.
TOGETHER = 4096
# Samples are so many pixels away from where the gradient of their location jumps, which is at every pixel's centre.
AWAY = 0.01


@dataclass
class SamplingInputs:
    device: str
    value: torch.Tensor
    levels: list[tuple[int, int]]
    locations: torch.Tensor
    weights: torch.Tensor
    gradient: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.value, self.locations, self.weights


def cases() -> list[Case]:
    found = []
    for batch in (1, 8):
        for dtype in DTYPES:
            for name, shape in SAMPLERS.items():
                if batch == 1 or name in IN_EIGHTS:
                    sizes = replace(shape, dtype=getattr(torch, dtype), batch=batch)
                    found.append(sampling_case(f"deformable_attention/{name}-b{batch}-{dtype}", sizes))
    for dtype in DTYPES:
        sizes = replace(SAMPLERS["detr-encoder"], dtype=getattr(torch, dtype))
        found.append(sampling_case(f"deformable_attention/{TRAINING}-b1-{dtype}", sizes, training=True))
    return found


def sampling_case(name: str, sizes: SamplingSizes, *, training: bool = False) -> Case:
    """One call of these sizes; for training with the gradients to value, locations and weights."""
    step = _forward_and_backward if training else _forward
    least = (deformable_training_floor if training else deformable_floor)(sizes)
    own = forms("deformable_attention", lambda inputs, backend: step(inputs, _sample(inputs.levels, backend)))
    providers: dict[str, Provider | Callable[[SamplingInputs], Call]] = {"reference": own["reference"]}
    if not training:
        providers |= compiled(own["reference"], "reference")
        providers |= compiled(own["torch"], "torch")
    providers |= own | {"triton": Provider(own["triton"], work=least)}
    if training:
        # A form of ours that is a kernel alone has to give the same bits again, which atomic additions do not.
        providers["triton"] = Provider(partial(within, deterministic, own["triton"]), work=least)
        providers["triton, atomics"] = Provider(own["triton"], work=least)
    for library in LIBRARIES:
        # deformops reads the sizes of the levels from the GPU.
        build = partial(_by_library, library, step)
        providers[f"reference, {library}"] = Provider(build, capturable=library != "deformops")
    at_hand = (sizes.batch, sizes.dtype) == (1, torch.float32)
    return Case(
        name,
        lambda device: make_inputs(sizes, device),
        providers,
        partial(_exact, training),
        least=least,
        devices=("cpu", "cuda") if at_hand else ("cuda",),
        capturable=sizes.batch == 1 and not training,
    )


def make_inputs(sizes: SamplingSizes, device: str) -> SamplingInputs:
    """Values, weights that sum to one, and locations in float32 a few pixels from each query's own place."""
    torch.manual_seed(0)
    batch, queries, heads, levels, points = sizes.batch, sizes.queries, sizes.heads, len(sizes.levels), sizes.points
    like = {"dtype": sizes.dtype, "device": device}
    value = torch.randn(batch, sizes.pixels, heads, sizes.channels, **like)
    weights = torch.randn(batch, queries, heads, levels * points, device=device).softmax(-1)
    places = _grid(sizes.levels, device) if sizes.grid else torch.rand(queries, 2, device=device, dtype=torch.float64)
    # As the network is initialised, every head looks in a direction of its own, and every point a pixel further.
    angle = torch.arange(heads, device=device) * (2 * torch.pi / heads)
    directions = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None]
    reach = torch.arange(1, points + 1, device=device)[:, None]
    offsets = directions * reach + torch.randn(batch, queries, heads, levels, points, 2, device=device)
    widths = torch.tensor([(w, h) for h, w in sizes.levels], device=device, dtype=torch.float64)[:, None]
    pixels = places[:, None, None, None] * widths + offsets - 0.5
    pixels = pixels.floor() + (pixels - pixels.floor()).clamp(AWAY, 1 - AWAY)
    locations = ((pixels + 0.5) / widths).float()
    gradient = torch.randn(batch, queries, heads * sizes.channels, **like)
    weights = weights.view(batch, queries, heads, levels, points).to(sizes.dtype)
    return SamplingInputs(device, value, list(sizes.levels), locations, weights, gradient)


def _grid(levels: Sequence[tuple[int, int]], device: str) -> torch.Tensor:
    """The centres (x, y) in [0, 1] of all pixels, [S, 2] in float64."""
    places = []
    for h, w in levels:
        y, x = ((torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n for n in (h, w))
        places.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1))
    return torch.cat(places)


def _sample(levels: Sequence[tuple[int, int]], backend: str) -> samplers.Sampler:
    def sample(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ops.deformable_attention(value, levels, locations, weights, backend=backend)

    return sample


def _forward(inputs: SamplingInputs, sample: samplers.Sampler) -> Call:
    return lambda: sample(*inputs.tensors)


def _forward_and_backward(inputs: SamplingInputs, sample: samplers.Sampler) -> Call:
    def call() -> list[torch.Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
        with torch.enable_grad():
            out = sample(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, inputs.gradient)]

    return call


def _by_extension(load: Callable[[], ModuleType], inputs: SamplingInputs) -> samplers.Sampler:
    samplers.require_float32_on_gpu(inputs.device, inputs.value.dtype)
    return samplers.extension_sampler(load(), inputs.levels, inputs.device)


LIBRARIES: dict[str, Callable[[SamplingInputs], samplers.Sampler]] = {
    "deformops": lambda inputs: samplers.deformops_sampler(inputs.levels, inputs.device),
    "hub kernel": partial(_by_extension, samplers.hub_kernel),
    "CUDA extension": partial(_by_extension, samplers.cuda_extension),
}


def _by_library(library: str, step: Callable[[SamplingInputs, samplers.Sampler], Call], inputs: SamplingInputs) -> Call:
    return step(inputs, LIBRARIES[library](inputs))


def _exact(training: bool, inputs: SamplingInputs) -> torch.Tensor | list[torch.Tensor]:
    """The reference in float64, picture by picture and a part of the queries at a time."""
    step, sample = (_forward_and_backward if training else _forward), _sample(inputs.levels, "reference")
    pictures = []
    for i in range(len(inputs.value)):
        value, *rest = (t[i : i + 1].double() for t in (*inputs.tensors, inputs.gradient))
        parts = []
        for of_queries in zip(*(t.split(TOGETHER, dim=1) for t in rest)):
            out = step(SamplingInputs(inputs.device, value, inputs.levels, *of_queries), sample)()
            parts.append(out if training else [out])
        outs, *gradients = zip(*parts)
        found = [torch.cat(outs, 1)]
        if training:
            # All queries read the same values, so their gradients add up.
            found += [sum(gradients[0]), *(torch.cat(g, 1) for g in gradients[1:])]
        pictures.append(found)
    whole = [torch.cat(tensors) for tensors in zip(*pictures)]
    return whole if training else whole[0]


def launches() -> dict[str, Launch]:
    """The forward and the backward pass, with atomic additions and in an order that is always the same."""
    return {
        "deformable_attention": Launch(_small, partial(_launch, False), repeatable=False),
        "deformable_attention, deterministic": Launch(_small, partial(_launch, True)),
    }


SMALL = SamplingSizes(torch.float32, ((5, 7), (3, 2)), 6, batch=2, heads=2, channels=16, points=3)


def _small(dtype: torch.dtype) -> list[torch.Tensor]:
    """Value, locations, weights, and a gradient of the result."""
    inputs = make_inputs(replace(SMALL, dtype=dtype), torch.get_default_device().type)
    return [*inputs.tensors, inputs.gradient]


def _launch(in_order: bool, tensors: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    inputs = SamplingInputs("", tensors[0], list(SMALL.levels), *tensors[1:])
    step = _forward_and_backward(inputs, _sample(inputs.levels, backend))
    # The reference has no such order on a GPU.
    with deterministic() if in_order and backend == "triton" else contextlib.nullcontext():
        return step()


def tunable() -> Tunable:
    return Tunable({"elements": POWERS[5:], "warps": POWERS[:4], "unroll": POWERS[:4]}, _fits, _problems)


# What is tuned: the shapes of the forward pass, and the encoder's backward pass.
TUNED = ("detr-encoder", "rt-detr", "adapter-injector")


def _problems() -> list[tuple[object, Case]]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name in TUNED:
            sizes = replace(SAMPLERS[name], dtype=dtype)
            case = sampling_case(f"deformable_attention/{name}-b1-{dtype_name(dtype)}", sizes)
            found.append((_key("forward", sizes), case.restricted(["torch", "triton"])))
        sizes = replace(SAMPLERS["detr-encoder"], dtype=dtype)
        found.append((_key("backward", sizes), _backward_case(sizes)))
    return found


def _key(stage: str, sizes: SamplingSizes) -> tuple[str, int, bool]:
    pixel = sizes.heads * sizes.channels
    strides = sizes.pixels * pixel, pixel, sizes.channels
    return configs.deformable_attention_bucket(stage, sizes.dtype.itemsize, sizes.channels, strides)


def _backward_case(sizes: SamplingSizes) -> Case:
    """The kernel of the gradients alone, beside the forward and the backward pass of the form in PyTorch."""

    def by_kernel(inputs: SamplingInputs) -> Call:
        value, locations, weights = inputs.tensors
        sides = [side for size in inputs.levels for side in size]
        return lambda: deformable_attention_backward(
            inputs.gradient, value, sides, locations, weights, [True, True, True]
        )

    def by_torch(inputs: SamplingInputs) -> Call:
        both = _forward_and_backward(inputs, _sample(inputs.levels, "torch"))
        return lambda: both()[1:]

    return Case(
        f"deformable_attention/{TRAINING}-b1-{dtype_name(sizes.dtype)}",
        lambda device: make_inputs(sizes, device),
        {"torch": by_torch, "triton": by_kernel},
        lambda inputs: _exact(True, inputs)[1:],
        baseline="torch",
    )


def _fits(key: tuple, tile: configs.SamplingTile, shared: int) -> bool:
    held = tile.elements // (32 * tile.warps)
    # A thread holds its sum, and the four pixels of every sample that is on its way.
    return 1 <= held <= 16 and held * (1 + 4 * tile.unroll) <= MOST_REGISTERS
