"""What the rules for whole deformable attentions share: the layers that they need, and a trial of another's forward."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ...modules.deformable_attention import Parts, attend

LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
SIZES = ("n_heads", "n_levels", "n_points")


class Inputs(NamedTuple):
    """What an attention is tried on, in float32 on the CPU.

    Attributes:
        query: [B, Q, d].
        points: reference points [B, Q, L or 1, 2 or 4].
        features: [B, S, d'].
        mask: [B, S], True where a pixel is padding.
        sizes: (h, w) of every level.
        shapes: the same as a tensor.
        starts: the first pixel of every level.
    """

    query: torch.Tensor
    points: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor
    sizes: list[tuple[int, int]]
    shapes: torch.Tensor
    starts: torch.Tensor


def has_layers(module: nn.Module) -> bool:
    """Whether a module has the four layers of a deformable attention, maybe among others."""
    return all(layer in module._modules for layer in LAYERS)


def takes(kind: type) -> tuple[str, ...]:
    """The names of the arguments of a module's forward; none where Python does not know them."""
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):
        return ()


def parts(module: nn.Module) -> Parts:
    """The layers of a module and their division."""
    return Parts(*(getattr(module, name) for name in (*LAYERS, *SIZES)))


def unsuited(module: nn.Module) -> str | None:
    """None where the module has the four layers in fitting widths, and no other layers or parameters.

    The layers may be wrapped or quantized, because they are called. Otherwise the text is the reason.
    """
    if sorted(module._modules) != sorted(LAYERS):
        return f"its layers are {', '.join(module._modules) or 'none'}, expected {', '.join(LAYERS)}"
    if module._parameters:
        return f"it has {', '.join(module._parameters)} of its own, beside its four layers"
    if missing := [name for name in SIZES if not isinstance(getattr(module, name, None), int)]:
        return f"it has no whole number {', '.join(missing)}"
    widths = [[getattr(module._modules[name], f"{way}_features", None) for way in ("in", "out")] for name in LAYERS]
    (query, offsets), (_, weights), (features, inner), (_, out) = widths
    samples = module.n_heads * module.n_levels * module.n_points
    expected = [[query, 2 * samples], [query, samples], [features, inner], [inner, out]]
    if widths != expected or None in (query, features, inner, out) or inner % module.n_heads:
        found = ", ".join(f"{name} {a} to {b}" for name, (a, b) in zip(LAYERS, widths))
        return f"the widths of its layers ({found}) do not fit {samples} samples in {module.n_heads} heads"
    return None


def differs(
    module: nn.Module, run: Callable[[nn.Module, Inputs], torch.Tensor], points: list[tuple[int, int]]
) -> str | None:
    """None where a class, tried on tiny maps, computes what Deformable DETR's attention does; else the difference.

    A twin of the module with random layers is tried on the CPU, so the module's own layers may be anywhere and of any
    kind.

    Args:
        module: suited to it, see `unsuited`.
        run: calls the original's forward of the twin.
        points: the last two sizes of the reference points that it is tried on.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (2, 2), *[(1, 2)] * module.n_levels][: module.n_levels]
    pixels = [h * w for h, w in sizes]

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    # There are as many queries as pixels, because an encoder attends to its own pixels.
    query = draw(2, sum(pixels), module.sampling_offsets.in_features) - 0.5
    features = draw(2, sum(pixels), module.value_proj.in_features) - 0.5
    mask = draw(2, sum(pixels)) > 0.8
    shapes = torch.tensor(sizes, device="cpu")
    starts = torch.tensor([sum(pixels[:level]) for level in range(len(pixels))], device="cpu")
    tried = f"tried on maps of {sizes}, it"
    # A new Linear and a dropout draw from torch's own generator, whose state is the caller's.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin = _twin(module)
        for levels, numbers in points:
            reference = draw(2, sum(pixels), levels, numbers)
            try:
                expected = attend(parts(twin), query, reference, features, sizes, mask, "reference")[0]
                found = run(twin, Inputs(query, reference, features, mask, sizes, shapes, starts))
                if found.shape != expected.shape:
                    return f"{tried} returns {list(found.shape)}, expected {list(expected.shape)}"
                error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
            # The code belongs to someone else and may raise any kind of error.
            except Exception as error:
                return f"{tried} fails: {error!r}"
            if not error <= 1e-4 * largest:
                return (
                    f"{tried} is {error:.2g} away from Deformable DETR's attention with reference points of {numbers} "
                    f"numbers (largest value {largest:.2g})"
                )
    return None


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes on the CPU, in float32, with random layers of the same widths."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    of_every_module = vars(nn.Module())
    vars(twin).update({name: value for name, value in vars(module).items() if name not in of_every_module})
    for name, buffer in module._buffers.items():
        twin.register_buffer(name, None if buffer is None else buffer.detach().to("cpu", torch.float32, copy=True))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=generator)

    for name in LAYERS:
        wide, out = module._modules[name].in_features, module._modules[name].out_features
        layer = nn.Linear(1, 1, device="cpu", dtype=torch.float32)
        layer.weight, layer.bias = nn.Parameter(draw(out, wide) / wide**0.5), nn.Parameter(draw(out))
        twin.add_module(name, layer)
    # A forward that differs in training differs from Deformable DETR's.
    return twin.train()
