"""Recognises deformable attentions of transformers that sample by a function, and runs them by `modules`' `attend`.

Their sampling cannot be exchanged alone, so their forward is.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ...modules.deformable_attention import attend
from ...ops import backend as backends
from .deformable_layers import Inputs, differs, parts, takes, unsuited
from .exchange import offer, replaced_on_object, warn
from .report import Finding

# RTDetrV2MultiscaleDeformableAttention, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention and so on.
KIND = "MultiscaleDeformableAttention"
SAMPLING = "MultiScaleDeformableAttention"
FUNCTION = "multi_scale_deformable_attention"
ARGUMENTS = ("hidden_states", "attention_mask", "encoder_hidden_states", "position_embeddings", "reference_points")
LOOKS_FOR = (
    f"deformable attention of transformers by a function `{FUNCTION}`, as in RT-DETR v2, Mask2Former and OneFormer"
)


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every deformable attention of transformers that holds no sampling module."""
    becomes = "now mg_fast.ops.deformable_attention with the module's own layers"
    for name, module in model.named_modules():
        kind = getattr(type(module), "_mg_fast_original", type(module))
        of_transformers = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(KIND)
        if of_transformers and not any(type(part).__name__ == SAMPLING for part in module.children()):
            what = f"deformable attention of {kind.__module__.split('.')[2]}"
            yield offer(name or "model", what, module, attended, _why_not, becomes)


def attended(original: type) -> dict[str, Callable]:
    """The method `forward` by `attend`, for a subclass of an attention of transformers."""

    second = _is_second(original)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        reference_points: torch.Tensor | None = None,
        *,
        spatial_shapes: torch.Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] | None = None,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of every query to a few points around its reference point in each map.

        Args:
            hidden_states: the queries [B, Q, d].
            attention_mask: [B, S], bool; True where a pixel counts in RT-DETR v2, and where it is padding in the
                others.
            encoder_hidden_states: [B, S, d], the maps of all levels one after the other.
            encoder_attention_mask: not read.
            position_embeddings: [B, Q, d], added to the queries.
            reference_points: [B, Q, L, 2 or 4], (x, y) or (x, y, w, h) in [0, 1].
            spatial_shapes: [L, 2], (h, w) of every level; read where there is no spatial_shapes_list.
            spatial_shapes_list: the same on the host.
            others: not read.

        Returns:
            [B, Q, d], and the weights of the points: [B, Q, H, L * P] in RT-DETR v2, [B, Q, H, L, P] in the others.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        reason = _unsuited(self)
        if reason or backends.choose("deformable_attention", None, hidden_states.device) == "reference":
            if reason:
                warn(f"{original.__name__} runs as transformers wrote it, because {reason}")
            given = {"spatial_shapes": spatial_shapes, "spatial_shapes_list": spatial_shapes_list}
            others |= {name: sizes for name, sizes in given.items() if sizes is not None}
            first = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask
            return original.forward(self, *first, position_embeddings, reference_points, **others)
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        padding = ~attention_mask if second and attention_mask is not None else attention_mask
        sizes = spatial_shapes.tolist() if spatial_shapes_list is None else spatial_shapes_list
        sizes = [(h, w) for h, w in sizes]
        out, weights = attend(parts(self), hidden_states, reference_points, encoder_hidden_states, sizes, padding)
        return out, weights.flatten(-2) if second else weights

    return {"forward": forward}


def _is_second(kind: type) -> bool:
    """Whether the attention is one of RT-DETR v2, whose mask and weights differ from those of the others."""
    return hasattr(inspect.getmodule(kind), f"{FUNCTION}_v2")


def _unsuited(module: nn.Module) -> str | None:
    """`unsuited`, and the attributes by which RT-DETR v2 chooses another arithmetic."""
    for name, expected in (("method", "default"), ("offset_scale", 0.5)):
        if (found := getattr(module, name, expected)) != expected:
            return f"its {name} is {found!r}, expected {expected!r}"
    return unsuited(module)


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    alone = f"it samples by a function, {FUNCTION}{'_v2' * _is_second(kind)}, which cannot be exchanged alone"
    if replaced_on_object(module, "forward"):
        return "forward was set on the object, over the method of its class"
    if reason := _unsuited(module):
        return f"{alone}, and {reason}"
    if missing := [name for name in ARGUMENTS if name not in takes(kind)]:
        return f"{alone}, and its forward has no {', '.join(missing)}"
    # RT-DETR v2 takes boxes only, one for all levels.
    return differs(module, _run, [(1, 4)] if _is_second(kind) else [(module.n_levels, 2), (module.n_levels, 4)])


def _run(twin: nn.Module, given: Inputs) -> torch.Tensor:
    kind = type(twin)
    sizes = {"spatial_shapes": given.shapes, "spatial_shapes_list": given.sizes}
    return kind.forward(
        twin,
        hidden_states=given.query,
        attention_mask=~given.mask if _is_second(kind) else given.mask,
        encoder_hidden_states=given.features,
        reference_points=given.points,
        **{name: value for name, value in sizes.items() if name in takes(kind)},
    )[0]
