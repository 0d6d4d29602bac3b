"""The rules for what is looked for in a model, and `accelerate` itself."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from ...modules import ConvNeXtPyramid, DeformableAttention, PatchInfoMining
from . import deformable_attention, deformable_functions, deformable_protocol, timm_convnext, unified_resampler
from .report import Finding, Report


def accelerate(model: nn.Module) -> Report:
    """Swaps mg_fast's operations into a model, in place.

    From then on mg_fast computes the following parts, wherever they are in `model`. Their arguments and results stay
    the same, and the model's own tensors are read as they are at each call:

    - patch info mining of the original Mini-Gemini, by `mg_fast.ops.patch_mining`;
    - the stages of timm's ConvNeXt (first version), by `mg_fast.modules.convnext_channels_last` on channels-last maps:
      in a timm model or a feature extractor around one, in OpenCLIP's `visual.trunk`, in the original's high-resolution
      tower. Their maps keep the layout [B, C, H, W]. Active stochastic depth (training mode, in which the original
      leaves its tower) is still run by timm: call `eval()` on the tower to have it swapped.
    - the sampling of transformers' deformable detectors, by `mg_fast.ops.deformable_attention`: in Deformable DETR,
      RT-DETR, RF-DETR, LW-DETR, Grounding DINO, MM Grounding DINO, OmDet-Turbo and PP-DocLayout v2 and newer;
    - the whole deformable attention of RT-DETR v2, Mask2Former and OneFormer, by the same operation with the module's
      own layers, because their sampling is a function and no module;
    - modules with the call of Deformable DETR's own `MSDeformAttn`, by the same operation with the module's own layers:
      MM-Interleaved's vision adapter and many detectors outside of transformers. Each call reads the sizes of the maps,
      which such a module gets as a tensor on the device, so it waits for the GPU once, and torch.compile starts a new
      graph there.

    Parameters, state_dict, training, device moves, copies and pickles work as before; a pickle of the swapped model
    needs mg_fast to be read. torch.jit.trace, torch.jit.script and torch.fx.symbolic_trace record the model's own code,
    not the swapped code, so what they return is not accelerated.

    Args:
        model: any module: the original's model itself, or a module that holds it.

    Returns:
        A report of what was swapped and what was not, with the reasons; `print` it. `undo()` puts the originals back.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {model!r:.80} of type {type(model).__name__}")
    # Everything is recognised before anything is changed, so that an error leaves the model as it was.
    entries = [entry for rule in RULES for entry in rule.recognise(model)]
    for entry in entries:
        if entry.apply:
            entry.apply()
    swapped, skipped = [e for e in entries if e.apply], [e for e in entries if not e.apply]
    return Report(type(model).__name__, swapped, skipped, [rule.looks_for for rule in RULES])


OURS = {
    PatchInfoMining: "patch info mining",
    ConvNeXtPyramid: "high-resolution tower",
    DeformableAttention: "deformable attention",
}


def _ours(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        for kind, what in OURS.items():
            if isinstance(module, kind):
                yield Finding(name or "model", what, f"already mg_fast.modules.{kind.__name__}")


class Rule(NamedTuple):
    """One rule: what it looks for, in words, and a function that yields its finds in a model.

    A find with `apply` and `undo` can be swapped.
    """

    looks_for: str
    recognise: Callable[[nn.Module], Iterator[Finding]]


RULES = (
    Rule(unified_resampler.LOOKS_FOR, unified_resampler.recognise),
    Rule(timm_convnext.LOOKS_FOR, timm_convnext.recognise),
    Rule(deformable_attention.LOOKS_FOR, deformable_attention.recognise),
    Rule(deformable_functions.LOOKS_FOR, deformable_functions.recognise),
    Rule(deformable_protocol.LOOKS_FOR, deformable_protocol.recognise),
    Rule(f"{', '.join(f'mg_fast.modules.{kind.__name__}' for kind in OURS)}, where nothing is left to do", _ours),
)
