"""Recognises the sampling of transformers' deformable detectors and runs `ops.deformable_attention` in its place."""

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ... import ops
from ...ops import backend as backends
from .exchange import offer, replaced_on_object, warn
from .report import Finding

SAMPLING = "MultiScaleDeformableAttention"
PARAMETERS = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)
LOOKS_FOR = (
    f"the sampling of transformers' deformable detectors: a module `{SAMPLING}`, as in Deformable DETR, RT-DETR, "
    "RF-DETR and Grounding DINO"
)


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every sampling module of transformers."""
    becomes = "now mg_fast.ops.deformable_attention"
    for name, module in model.named_modules():
        kind = getattr(type(module), "_mg_fast_original", type(module))
        if kind.__name__ == SAMPLING and kind.__module__.startswith("transformers.models."):
            what = f"deformable sampling of {kind.__module__.split('.')[2]}"
            yield offer(name or "model", what, module, sampled, _why_not, becomes)


def sampled(original: type) -> dict[str, Callable]:
    """The method `forward` by `ops.deformable_attention`, for a subclass of transformers' sampling module."""

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        """Samples the maps of all levels.

        Args:
            value: [B, S, H, D], the maps of all levels one after the other.
            value_spatial_shapes: the sizes on the device, which are not read.
            value_spatial_shapes_list: (h, w) of every level, on the host.
            level_start_index: the first pixel of every level on the device, which is not read.
            sampling_locations: [B, Q, H, L, P, 2], (x, y) in [0, 1].
            attention_weights: [B, Q, H, L, P].
            im2col_step: not read.

        Returns:
            [B, Q, H * D] in the widest dtype of values, locations and weights, as the original's sum has.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        rest = level_start_index, sampling_locations, attention_weights, im2col_step
        if backends.choose("deformable_attention", None, value.device) == "reference":
            return original.forward(self, value, value_spatial_shapes, value_spatial_shapes_list, *rest)
        if not isinstance(value_spatial_shapes_list, (list, tuple)):
            found = type(value_spatial_shapes_list).__name__
            warn(f"{SAMPLING} runs as transformers wrote it, because the sizes are no list on the host but {found}")
            return original.forward(self, value, value_spatial_shapes, value_spatial_shapes_list, *rest)
        out = ops.deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        # Under autocast the values have 16 bits, while locations and weights have float32.
        widest = torch.promote_types(sampling_locations.dtype, attention_weights.dtype)
        return out.to(torch.promote_types(value.dtype, widest))

    return {"forward": forward}


def _why_not(module: nn.Module) -> str | None:
    from_the_hub = "as a kernel from the hub does (use_kernels=True)"
    if replaced_on_object(module, "forward"):
        return f"forward was set on the object, over the method of its class, {from_the_hub}"
    method = type(module).forward
    if method.__module__ != type(module).__module__:
        return f"the forward of its class was replaced by one of {method.__module__}, {from_the_hub}"
    if (takes := tuple(inspect.signature(method).parameters)[1:]) != PARAMETERS:
        return f"it takes {', '.join(takes)}, expected {', '.join(PARAMETERS)}"
    if module.state_dict() or any(True for _ in module.children()):
        return "it has tensors or modules of its own, which the sampling alone has not"
    return _differs(module)


def _differs(module: nn.Module) -> str | None:
    """None where the module, tried on two tiny maps, computes what `ops.deformable_attention` computes.

    Otherwise the text is the difference.
    """
    sizes, generator = [(3, 4), (2, 2)], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    # Some of the points lie outside of the maps.
    value, locations, weights = draw(2, 16, 2, 4) - 0.5, draw(2, 3, 2, 2, 2, 2) * 1.5 - 0.25, draw(2, 3, 2, 2, 2)
    tried = f"tried on maps of {sizes}, it"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            expected = ops.deformable_attention(value, sizes, locations, weights, backend="reference")
            shapes, starts = torch.tensor(sizes, device="cpu"), torch.tensor([0, 12], device="cpu")
            found = module.forward(value, shapes, sizes, starts, locations, weights, 64)
            if found.shape != expected.shape:
                return f"{tried} returns {list(found.shape)}, expected {list(expected.shape)}"
            error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        # The code belongs to someone else and may raise any kind of error.
        except Exception as error:
            return f"{tried} fails: {error!r}"
    if not error <= 1e-5 * largest:
        return f"{tried} is {error:.2g} away from deformable attention (largest value {largest:.2g})"
    return None
