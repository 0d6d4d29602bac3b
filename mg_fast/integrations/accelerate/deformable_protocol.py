"""Recognises modules with the call of Deformable DETR's `MSDeformAttn` and runs `ops.deformable_attention` in them."""

import inspect
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ... import ops
from ...modules.deformable_attention import attend
from .deformable_layers import Inputs, differs, has_layers, parts, takes, unsuited
from .exchange import offer, replaced_on_object, warn
from .report import Finding

KIND = "MSDeformAttn"
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
LOOKS_FOR = f"deformable attention by Deformable DETR's own `{KIND}`, or a module with its layers and arguments"


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every module with the original's name, or with its layers and its arguments."""
    becomes = (
        "now mg_fast.ops.deformable_attention with the module's own layers. Each call reads the sizes of the maps from "
        "input_spatial_shapes, for which it waits for a GPU once"
    )
    for name, module in model.named_modules():
        named = type(module).__name__ == KIND
        if named or has_layers(module) and takes(type(module)) == PARAMETERS:
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
        if reason := unsuited(self):
            # The layers were changed after the swap, so the original runs them as they are now.
            warn(f"{original.__name__} runs as the original wrote it, because {reason}")
            rest = input_spatial_shapes, input_level_start_index, input_padding_mask
            return original.forward(self, query, reference_points, input_flatten, *rest)
        sizes = [(h, w) for h, w in input_spatial_shapes.tolist()]
        return attend(parts(self), query, reference_points, input_flatten, sizes, input_padding_mask)[0]

    return {"forward": forward}


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if replaced_on_object(module, "forward"):
        return "forward was set on the object, over the method of its class"
    if takes(kind) != PARAMETERS:
        return f"it takes {', '.join(takes(kind))}, expected {', '.join(PARAMETERS)}"
    if not inspect.isfunction(kind.forward):
        return f"its forward is no plain function but {type(kind.forward).__name__}"
    return unsuited(module) or differs(module, _run, [(module.n_levels, 2), (module.n_levels, 4)])


def _run(twin: nn.Module, given: Inputs) -> torch.Tensor:
    """Calls the original's forward, whose operation runs on CUDA only, with ours in its place.

    What is tried is therefore everything around the operation.
    """
    forward = _without_cuda(type(twin).forward)
    return forward(twin, given.query, given.points, given.features, given.shapes, given.starts, given.mask)


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
