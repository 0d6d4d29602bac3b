"""Recognises patch info mining of the original project and runs `ops.patch_mining` in its place."""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ... import ops
from ...modules import PatchInfoMining
from ...modules.patch_mining import unsuited_projector
from ...ops import backend as backends
from ...ops.reference import Projection
from .exchange import offer, replaced_on_object, warn
from .report import Finding

METHOD = "unified_resampler"
PROJECTORS = ("vlm_uni_query_projector", "vlm_uni_aux_projector", "vlm_uni_val_projector")
LOOKS_FOR = (
    f"patch info mining of the original project: a method `{METHOD}`, "
    f"with {', '.join(f'`{name}`' for name in PROJECTORS)} "
    "on the same object, its get_model() or its `model`"
)


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every object with the original's method, and projectors whose owner was not passed in."""
    owners, inner_models = [], set()
    for name, module in model.named_modules():
        # Only the class's own method counts: wrappers that forward attributes hold the model as a submodule.
        if callable(getattr(type(module), METHOD, None)) or replaced_on_object(module, METHOD):
            owners.append((f"{name}.{METHOD}".lstrip("."), module))
            inner_models.add(id(_inner(module)))
    becomes = "now mg_fast.ops.patch_mining with the model's own projectors"
    for name, module in owners:
        yield offer(name, f"patch info mining of {type(module).__name__}", module, mined, _why_not, becomes)
    for name, module in model.named_modules():
        has_all = all(projector in module._modules for projector in PROJECTORS)
        if has_all and id(module) not in inner_models and not isinstance(module, PatchInfoMining):
            reason = f"no {METHOD} here uses them: pass in the model around it, whose get_model() this is"
            yield Finding(f"{name}.{PROJECTORS[0]}".lstrip("."), f"projectors of {type(module).__name__}", reason)


def mined(original: type) -> dict[str, Callable]:
    """The method `unified_resampler` by `ops.patch_mining`, for a subclass of the original's model."""

    def unified_resampler(self, images: torch.Tensor, images_aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mines the map for every query.

        Args:
            images: queries [B, N, D], where N is a square number.
            images_aux: the channel-concatenated map [B, C, S, S], where S is a multiple of sqrt(N).

        Returns:
            The queries themselves, and the mined features [B, N, D] without the residual.

        Raises:
            ValueError: the shapes do not fit.
        """
        if reason := _unusual(self):
            # The projectors were changed after the swap, so the original runs them as they are now.
            warn(f"{METHOD} runs as the original wrote it, because {reason}")
            return original.unified_resampler(self, images, images_aux)
        if images.dim() != 3 or images_aux.dim() != 4:
            shapes = f"{list(images.shape)} and {list(images_aux.shape)}"
            raise ValueError(f"{METHOD}: expected queries [B, N, D] and a map [B, C, S, S], got {shapes}")
        return images, _mine(images, images_aux, _projections(self))

    return {METHOD: unified_resampler}


def _mine(images: torch.Tensor, images_aux: torch.Tensor, projections: list[Projection]) -> torch.Tensor:
    pixels = images_aux.permute(0, 2, 3, 1)
    if backends.choose("patch_mining", None, images.device) != "reference":
        # The original makes this copy too. The other forms read the channels of a pixel together.
        pixels = pixels.contiguous()
    return ops.patch_mining(images, [pixels], *projections)


def _inner(owner: nn.Module):
    """The object on which the original's method finds its projectors, or None where there is none."""
    get_model = getattr(owner, "get_model", None)
    for candidate in (get_model() if callable(get_model) else None, getattr(owner, "model", None), owner):
        if all(hasattr(candidate, name) for name in PROJECTORS):
            return candidate
    return None


def _projections(owner: nn.Module) -> list[Projection]:
    projectors = [getattr(_inner(owner), name) for name in PROJECTORS]
    return [Projection(norm.weight, norm.bias, linear.weight, linear.bias) for norm, linear in projectors]


def _unusual(owner: nn.Module) -> str | None:
    """None where the projectors are the original's: plain LayerNorm and Linear, and only four tensors of each matter.

    Otherwise the text is the reason.
    """
    inner = _inner(owner)
    if inner is None:
        return f"neither its get_model() nor its `model` nor itself has {', '.join(PROJECTORS)}"
    for name in PROJECTORS:
        if reason := unsuited_projector(name, getattr(inner, name)):
            return reason
    query, key, value = _projections(owner)
    dim, channels = query.norm_weight.shape[-1], key.norm_weight.shape[-1]
    for name, projection, width in zip(PROJECTORS, (query, key, value), (dim, channels, channels)):
        shapes = [[*projection.norm_weight.shape], [*projection.weight.shape]]
        if shapes != [[width], [dim, width]]:
            found = f"a LayerNorm of {shapes[0]} and a Linear of {shapes[1]}"
            return f"{name} has {found}, expected [{width}] and [{dim}, {width}]"
    return None


def _differs(owner: nn.Module) -> str | None:
    """None where the method, tried on a tiny map, computes what the original's does; otherwise the difference.

    Another project may use the name for something else.
    """
    projections = _projections(owner)
    like, channels = projections[0].weight, projections[1].weight.shape[1]
    if like.is_meta:
        return "its projectors are on the meta device and cannot be tried: accelerate the model when it is loaded"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 4, len(like), generator=generator, device="cpu").to(like)
    images_aux = torch.randn(2, channels, 4, 4, generator=generator, device="cpu").to(like)
    tried = f"tried on a map of {list(images_aux.shape)}, it"
    with torch.no_grad():
        try:
            expected = ops.patch_mining(images, [images_aux.permute(0, 2, 3, 1)], *projections, backend="reference")
            same, mined = getattr(owner, METHOD)(images, images_aux)
            if not torch.equal(same, images) or mined.shape != expected.shape:
                return (
                    f"{tried} does not return its first argument as it is and mined features of {list(expected.shape)}"
                )
            # The original's own steps agree to the last bit. The tolerance is for the same mathematics in other steps.
            error, largest = (mined - expected).abs().max().item(), expected.abs().max().item()
        # The code belongs to someone else and may raise any kind of error.
        except Exception as error:
            return f"{tried} fails: {error!r}"
    if not error <= max(1e-4, 8 * torch.finfo(like.dtype).eps) * largest:
        return f"{tried} is {error:.2g} away from the original's patch info mining (largest value {largest:.2g})"
    return None


def _why_not(owner: nn.Module) -> str | None:
    if replaced_on_object(owner, METHOD):
        return f"{METHOD} was set on the object, over the method of its class: it is not the original's"
    takes = inspect.signature(getattr(owner, METHOD))
    if len(takes.parameters) != 2:
        return f"it takes {takes}, expected two tensors"
    return _unusual(owner) or _differs(owner)
