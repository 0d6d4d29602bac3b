"""Recognises stages of timm's ConvNeXt and runs `mg_fast.modules.convnext_channels_last` in their place."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ...modules import ConvNeXtPyramid
from ...modules import convnext_channels_last as convnext
from ...modules.convnext import unsuited_stage
from ...ops import backend as backends
from ...runtime.weights import why_more_than_weights
from .exchange import offer, replaced_on_object, warn
from .report import Finding

LOOKS_FOR = "stages of timm's ConvNeXt (timm.models.convnext.ConvNeXtStage), wherever they sit"
STOCHASTIC = "its stochastic depth is at work in training mode: eval() makes it deterministic"


def recognise(model: nn.Module) -> Iterator[Finding]:
    """Yields every stage that is not part of one of mg_fast's own towers."""
    # A model with such stages has imported timm already. For a model without them, importing timm would be slow.
    timm_convnext = sys.modules.get("timm.models.convnext")
    if timm_convnext is None:
        return
    ours = {id(part) for tower in model.modules() if isinstance(tower, ConvNeXtPyramid) for part in tower.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, timm_convnext.ConvNeXtStage) or id(module) in ours:
            continue
        becomes = "now mg_fast.modules.convnext_channels_last with the stage's own tensors"
        if any(map(_stochastic, module.modules())):
            becomes += f"; for now it runs as timm wrote it, because {STOCHASTIC}"
        yield offer(
            name or "model", f"ConvNeXt stage of {len(module.blocks)} blocks", module, channels_last, _why_not, becomes
        )


def channels_last(original: type) -> dict[str, Callable]:
    """The method `forward` by `convnext.run_stage`, for a subclass of timm's stage."""

    # The roles are looked up here because the tracer of a graph cannot see into caches.
    roles = roles_in_a_stage()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the stage.

        Args:
            x: map [B, C, H, W], any strides; fastest if it is channels last in memory. It is never changed.

        Returns:
            [B, C', H', W'], channels last in memory.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        if x.dim() != 4:
            raise ValueError(f"ConvNeXt stage: expected a map [B, C, H, W], got {list(x.shape)}")
        if backends.choose("high_resolution_tower", None, x.device) == "reference":
            return original.forward(self, x)
        if reason := why_not_a_first_version(self, roles) or _unusual_autocast(self, x):
            # What has changed since the swap, training mode included, is run by timm.
            warn(f"a ConvNeXt stage runs as timm wrote it, because {reason}")
            return original.forward(self, x)
        return _run(self, x)

    return {"forward": forward}


def _run(stage: nn.Module, x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        # This is the dtype of timm's sum of the residual and the scaled branch.
        x = x.to(torch.promote_types(x.dtype, stage.blocks[0].conv_dw.weight.dtype))
    pixels = x.permute(0, 2, 3, 1)
    # A copy belongs to this call alone, so it may be overwritten.
    copied = not pixels.is_contiguous()
    out = convnext.run_stage(convnext.read_stage(stage), pixels.contiguous(), backend, in_place=copied)
    return out.permute(0, 3, 1, 2)


def roles_in_a_stage() -> dict[str, tuple[type, ...]]:
    """The layer classes whose arithmetic `convnext` knows, by their name within a stage.

    Subclasses compute something else: adapters, quantized layers.
    """
    from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp
    from timm.layers.activations import GELU
    from timm.models.convnext import ConvNeXtBlock

    return {
        "downsample": (nn.Identity, nn.Sequential),
        "downsample.0": (LayerNorm2d,),
        "downsample.1": (nn.Conv2d,),
        "blocks": (nn.Sequential,),
        "block": (ConvNeXtBlock,),
        "conv_dw": (nn.Conv2d,),
        "norm": (LayerNorm, LayerNorm2d, nn.LayerNorm, nn.Identity),
        "mlp": (Mlp,),
        "fc1": (nn.Linear, nn.Conv2d),
        "act": (GELU, nn.GELU),
        "drop1": (nn.Dropout, nn.Identity),
        "fc2": (nn.Linear, nn.Conv2d),
        "drop2": (nn.Dropout, nn.Identity),
        "shortcut": (nn.Identity,),
        "drop_path": (DropPath, nn.Identity),
    }


def why_not_a_first_version(stage: nn.Module, roles: dict[str, tuple[type, ...]]) -> str | None:
    """None where the stage is that of a ConvNeXt of the first version and only its tensors enter the result.

    Otherwise the text is the reason.
    """
    for name, layer in stage.named_modules():
        if layer is stage:
            continue
        last = name.rpartition(".")[2]
        role = name if name.startswith("downsample") else "block" if last.isdigit() else last
        if type(layer) not in roles.get(role, ()):
            found = f"{type(layer).__module__}.{type(layer).__qualname__}"
            return f"{name} is {found}, not a layer of a ConvNeXt of the first version"
        if _stochastic(layer):
            return STOCHASTIC
    # The stage itself is called, so that its own hooks run as before. A layer inside it with a hook of accelerate's is
    # not plain, because it is unknown here whether the hook would move a map to another device.
    if reason := why_more_than_weights(stage, None, called=True, placed=False):
        return reason
    if stage.grad_checkpointing:
        return "its gradient checkpointing is on"
    return unsuited_stage(stage)


def _stochastic(layer: nn.Module) -> bool:
    rate = {"DropPath": "drop_prob", "Dropout": "p"}.get(type(layer).__name__)
    return rate is not None and layer.training and getattr(layer, rate) > 0


def _unusual_autocast(stage: nn.Module, x: torch.Tensor) -> str | None:
    if torch.is_autocast_enabled(x.device.type) and any(block.gamma is None for block in stage.blocks):
        # timm's map then has autocast's dtype from block to block, while ours has that of the weights.
        return "without layer scale its maps are of another dtype under autocast"
    return None


def _why_not(stage: nn.Module) -> str | None:
    from timm.models.convnext import ConvNeXtStage

    if replaced_on_object(stage, "forward"):
        return "forward was set on the object, over the method of its class"
    if type(stage).forward is not ConvNeXtStage.forward:
        return f"{type(stage).__name__} has a forward of its own"
    if not len(stage.blocks):
        return "it has no blocks"
    with _deterministic(stage):
        return why_not_a_first_version(stage, roles_in_a_stage()) or _differs(stage)


@contextlib.contextmanager
def _deterministic(stage: nn.Module):
    """Turns stochastic depth off within the context.

    It does not keep a stage from being swapped, because every call checks it again.
    """
    active = [layer for layer in stage.modules() if _stochastic(layer)]
    try:
        for layer in active:
            layer.training = False
        yield
    finally:
        for layer in active:
            layer.training = True


def _differs(stage: nn.Module) -> str | None:
    """None where the stage, tried on a tiny map, computes what `convnext` computes; otherwise the difference."""
    block = stage.blocks[0]
    like = block.conv_dw.weight
    if like.is_meta:
        return "it is on the meta device and cannot be tried: accelerate the model when it is loaded"
    channels = len(block.norm.weight if isinstance(stage.downsample, nn.Identity) else stage.downsample[0].weight)
    x = torch.randn(1, channels, 16, 10, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    tried = f"tried on a map of {list(x.shape)}, it"
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            expected, ours = stage.forward(x), _run(stage, x, "torch")
            if ours.shape != expected.shape:
                return f"{tried} returns {list(expected.shape)}, expected {list(ours.shape)}"
            error, largest = (ours - expected).abs().max().item(), expected.abs().max().item()
        # The code belongs to someone else and may raise any kind of error.
        except Exception as error:
            return f"{tried} fails: {error!r}"
    # The library's convolutions on a GPU round float32 to 10 bits unless they are told otherwise.
    eps = torch.finfo(like.dtype).eps if like.device.type == "cpu" else max(torch.finfo(like.dtype).eps, 2**-10)
    if not error <= max(1e-4, 8 * eps) * largest:
        return f"{tried} is {error:.2g} away from a ConvNeXt of the first version (largest value {largest:.2g})"
    return None
