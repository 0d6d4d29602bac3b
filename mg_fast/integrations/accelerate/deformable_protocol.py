"""Recognises modules with the call of Deformable DETR's `MSDeformAttn` and runs `ops.deformable_attention` in them."""

import inspect
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ... import ops
from ...modules.deformable_attention import Parts, attend
from .exchange import offer, replaced_on_object, warn
from .report import Finding

KIND = "MSDeformAttn"
LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
SIZES = ("n_heads", "n_levels", "n_points")
PARAMETERS = (
    "query",
    "reference_points",
    "input_flatten",
    "input_spatial_shapes",
    "input_level_start_index",
    "input_padding_mask",
)
# The name under which the original's forward finds its CUDA operation.
OPERATION = "MSDeformAttnFunction"
LOOKS_FOR = f"deformable attention with the call of Deformable DETR: a module `{KIND}`, or one with the same layers and arguments"


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every module with the original's name, or with its layers and its arguments."""
    becomes = (
        "now mg_fast.ops.deformable_attention with the module's own layers. Each call reads the sizes of the maps from "
        "input_spatial_shapes, for which it waits for a GPU once"
    )
    for name, module in model.named_modules():
        named = type(module).__name__ == KIND
        if named or all(layer in module._modules for layer in LAYERS) and _takes(type(module)) == PARAMETERS:
            what = f"deformable attention {type(module).__name__}"
            yield offer(name or "model", what, module, attended, _why_not, becomes)


def attended(original: type) -> dict[str, Callable]:
    """The method `forward` by `ops.deformable_attention`, for a subclass of the original's module."""

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        input_spatial_shapes: torch.Tensor,
        input_level_start_index: torch.Tensor,
        input_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of every query to a few points around its reference point in each map.

        Args:
            query: [B, Q, d].
            reference_points: [B or 1, Q, L or 1, 2 or 4], (x, y) or (x, y, w, h) in [0, 1].
            input_flatten: [B, S, d], the maps of all levels one after the other.
            input_spatial_shapes: [L, 2], (h, w) of every level; it is read once.
            input_level_start_index: the first pixel of every level, which is not read.
            input_padding_mask: [B, S], bool, True where a pixel is padding.

        Returns:
            [B, Q, d].

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        if reason := _unsuited(self):
            # The layers were changed after the swap, so the original runs them as they are now.
            warn(f"{original.__name__} runs as the original wrote it, because {reason}")
            rest = input_spatial_shapes, input_level_start_index, input_padding_mask
            return original.forward(self, query, reference_points, input_flatten, *rest)
        sizes = [(h, w) for h, w in input_spatial_shapes.tolist()]
        return attend(_parts(self), query, reference_points, input_flatten, sizes, input_padding_mask)

    return {"forward": forward}


def _parts(module: nn.Module) -> Parts:
    return Parts(*(getattr(module, name) for name in (*LAYERS, *SIZES)))


def _takes(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _unsuited(module: nn.Module) -> str | None:
    """None where the module has the original's four layers in fitting widths, and nothing else.

    The layers may be wrapped or quantized, because they are called. Otherwise the text is the reason.
    """
    if sorted(module._modules) != sorted(LAYERS):
        return f"its layers are {', '.join(module._modules) or 'none'}, expected {', '.join(LAYERS)}"
    if own := [*module._parameters, *module._buffers]:
        return f"it has {', '.join(own)} of its own, beside its four layers"
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


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if replaced_on_object(module, "forward"):
        return "forward was set on the object, over the method of its class"
    if (takes := _takes(kind)) != PARAMETERS:
        return f"it takes {', '.join(takes)}, expected {', '.join(PARAMETERS)}"
    if not inspect.isfunction(kind.forward):
        return f"its forward is no plain function but {type(kind.forward).__name__}"
    return _unsuited(module) or _differs(module)


def _differs(module: nn.Module) -> str | None:
    """None where the class, tried on tiny maps, computes what Deformable DETR's does; otherwise the difference.

    A twin of the module with random layers is tried on the CPU, so the module's own layers may be anywhere and of any
    kind. The original's operation runs on CUDA only and is therefore replaced by ours. What is tried is everything
    around it.
    """
    twin, forward = _twin(module), _without_cuda(type(module).forward)
    generator, sizes = (
        torch.Generator().manual_seed(0),
        [(3, 4), (2, 2), *[(1, 2)] * module.n_levels][: module.n_levels],
    )
    pixels = [h * w for h, w in sizes]

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu")

    query = draw(2, 3, module.sampling_offsets.in_features) - 0.5
    features = draw(2, sum(pixels), module.value_proj.in_features) - 0.5
    mask = draw(2, sum(pixels)) > 0.8
    shapes = torch.tensor(sizes, device="cpu")
    starts = torch.tensor([sum(pixels[:level]) for level in range(len(pixels))], device="cpu")
    tried = f"tried on maps of {sizes}, it"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for numbers in (2, 4):
            points = draw(2, 3, module.n_levels, numbers)
            try:
                expected = attend(_parts(twin), query, points, features, sizes, mask, "reference")
                found = forward(twin, query, points, features, shapes, starts, mask)
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
    generator = torch.Generator().manual_seed(1)
    for name in LAYERS:
        like = module._modules[name]
        layer = nn.utils.skip_init(nn.Linear, like.in_features, like.out_features, device="cpu", dtype=torch.float32)
        for tensor in layer.parameters():
            nn.init.uniform_(tensor, -1, 1, generator=generator)
        with torch.no_grad():
            layer.weight.div_(like.in_features**0.5)
        twin.add_module(name, layer)
    return twin.eval()


class _Operation:
    """Stands in for the original's autograd function."""

    @staticmethod
    def apply(value, shapes, starts, locations, weights, im2col_step):
        return ops.deformable_attention(value, shapes.tolist(), locations, weights, backend="reference")


def _without_cuda(forward: types.FunctionType) -> types.FunctionType:
    """The method as it is, except that it finds a plain form under the name of its CUDA operation."""
    names = forward.__globals__ | ({OPERATION: _Operation} if OPERATION in forward.__globals__ else {})
    plain = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    plain.__kwdefaults__ = forward.__kwdefaults__
    return plain
