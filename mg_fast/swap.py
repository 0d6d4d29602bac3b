"""`accelerate(model)`: puts mg_fast's operations into a model that someone else built, says what it did, and undoes it.

A rule recognises one kind of thing and says for each find what becomes of it. What cannot be swapped without other numbers stays
as it is, with the reason.
"""

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from . import backend as backends
from . import ops
from .errors import MgFastError
from .modules import PatchInfoMining
from .reference import LAYER_NORM_EPS, Projection

METHOD = "unified_resampler"
PROJECTORS = ("vlm_uni_query_projector", "vlm_uni_aux_projector", "vlm_uni_val_projector")


@dataclass
class Entry:
    """One thing that `accelerate` recognised.

    Attributes:
        name: where it is, as a dotted name from the model that was handed over.
        what: what was found there.
        reason: what took its place, or why nothing did.
    """

    name: str
    what: str
    reason: str
    apply: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.what}): {self.reason}"


@dataclass
class Report:
    """What `accelerate` did to a model, for reading (`print(report)`) and for undoing. It does not keep the model alive.

    Attributes:
        model: class of the model.
        swapped: what was swapped.
        skipped: what was recognised and left as it is.
    """

    model: str
    swapped: list[Entry]
    skipped: list[Entry]

    def undo(self) -> None:
        """Puts the originals back, those included that an earlier call had swapped already. A second time it does nothing.

        Raises:
            MgFastError: something else has been put over a swap since; that one stays until this is called again.
        """
        stuck = []
        for entry in self.swapped + self.skipped:
            if entry.undo is None:
                continue
            try:
                entry.undo()
                # spent: a later call's swap is undone by its own report
                entry.undo = None
            except MgFastError as error:
                stuck.append(f"{entry.name}: {error}")
        if stuck:
            raise MgFastError(f"not undone: {'; '.join(stuck)}")

    def __str__(self) -> str:
        if not self.swapped and not self.skipped:
            nothing = f"mg_fast.accelerate: nothing recognised in {self.model}, and nothing changed. Looked for:"
            return "\n".join([nothing, *(f"  {rule.looks_for}" for rule in RULES)])
        lines = [f"mg_fast.accelerate: {self.model}, {len(self.swapped)} swapped, {len(self.skipped)} not swapped"]
        lines += [f"  swapped      {entry}" for entry in self.swapped]
        lines += [f"  not swapped  {entry}" for entry in self.skipped]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Swaps mg_fast's operations into a model, in place.

    Patch info mining of the original Mini-Gemini, wherever it sits in `model`, is computed by `mg_fast.ops.patch_mining` from then on:
    the same arguments and results, from the model's own projectors as they are at each call. Parameters, state_dict, training, device
    moves, copies and pickles work as before; a pickle of the swapped model needs mg_fast to be read.

    Args:
        model: any module. The original's model itself, or something that holds it.

    Returns:
        What was swapped and what was not, with the reasons; `print` it. Its `undo()` puts the originals back.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {model!r:.80} of type {type(model).__name__}")
    # everything is recognised before anything is changed: an error on the way leaves the model as it was
    entries = [entry for rule in RULES for entry in rule.recognise(model)]
    for entry in entries:
        if entry.apply:
            entry.apply()
    return Report(type(model).__name__, [e for e in entries if e.apply], [e for e in entries if not e.apply])


# A swap exchanges the object's class for a subclass and sets nothing on the object: `self` stays whoever is called, in deep copies,
# pickles and the replicas of DataParallel too, and the object's own state is untouched.


@functools.cache
def _mined(original: type) -> type:
    """The class of the original's model with `unified_resampler` by `ops.patch_mining`."""

    def unified_resampler(self, images: torch.Tensor, images_aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mines a map with queries.

        Args:
            images: queries [B, N, D], N a square number.
            images_aux: the channel-concatenated map [B, C, S, S], S a multiple of sqrt(N).

        Returns:
            The queries themselves, and the mined features [B, N, D], residual not added.

        Raises:
            ValueError: shapes that do not fit.
        """
        if reason := _unusual(self):
            # the projectors were changed after the swap: what they are now is the original's to run
            warnings.warn(f"mg_fast.accelerate: {METHOD} runs as the original wrote it, because {reason}", RuntimeWarning, stacklevel=2)
            return original.unified_resampler(self, images, images_aux)
        if images.dim() != 3 or images_aux.dim() != 4:
            shapes = f"{list(images.shape)} and {list(images_aux.shape)}"
            raise ValueError(f"{METHOD}: expected queries [B, N, D] and a map [B, C, S, S], got {shapes}")
        return images, _mine(images, images_aux, _projections(self))

    def __reduce_ex__(self, protocol):
        # a pickle finds classes by name, and this one's name is the original's
        make, (_, *arguments), *state = super(_mined(original), self).__reduce_ex__(protocol)
        return _remake, (original, make, *arguments), *state

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {METHOD: unified_resampler, "__reduce_ex__": __reduce_ex__, "_mg_fast_original": original}
    return types.new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(names | methods))


def _remake(original: type, make: Callable, *arguments):
    return make(_mined(original), *arguments)


def _swap_class(reference: weakref.ref) -> None:
    module = reference()
    module.__class__ = _mined(type(module))


def _restore_class(reference: weakref.ref) -> None:
    module = reference()
    if not hasattr(type(module), "_mg_fast_original"):
        return
    if "_mg_fast_original" not in vars(type(module)):
        raise MgFastError(f"its class was exchanged again since, for {type(module).__name__}: undo that first")
    module.__class__ = type(module)._mg_fast_original


def _mine(images: torch.Tensor, images_aux: torch.Tensor, projections: list[Projection]) -> torch.Tensor:
    pixels = images_aux.permute(0, 2, 3, 1)
    if backends.choose("patch_mining", None, images.device) != "reference":
        # the copy that the original makes too: the other forms read a pixel's channels together
        pixels = pixels.contiguous()
    return ops.patch_mining(images, [pixels], *projections)


def _inner(owner: nn.Module):
    """The object on which the original's method finds its projectors; None where there is none."""
    get_model = getattr(owner, "get_model", None)
    for candidate in (get_model() if callable(get_model) else None, getattr(owner, "model", None), owner):
        if all(hasattr(candidate, name) for name in PROJECTORS):
            return candidate
    return None


def _projections(owner: nn.Module) -> list[Projection]:
    projectors = [getattr(_inner(owner), name) for name in PROJECTORS]
    return [Projection(norm.weight, norm.bias, linear.weight, linear.bias) for norm, linear in projectors]


def _unusual(owner: nn.Module) -> str | None:
    """None where the projectors are the original's: plain LayerNorm and Linear, of which nothing but four tensors enters the result."""
    inner = _inner(owner)
    if inner is None:
        return f"neither its get_model() nor its `model` nor itself has {', '.join(PROJECTORS)}"
    for name in PROJECTORS:
        projector = getattr(inner, name)
        layers = list(projector) if type(projector) is nn.Sequential else [projector]
        # subclasses compute something else: low-rank adapters, quantised layers, parametrisations
        if [type(layer) for layer in layers] != [nn.LayerNorm, nn.Linear]:
            found = " and ".join(f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers)
            return f"{name} is {found}, expected a Sequential of LayerNorm and Linear"
        for part in (projector, *layers):
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"{name} has hooks on its {type(part).__name__}, which only a call of the module runs"
            if "forward" in vars(part):
                return f"the forward of {name}'s {type(part).__name__} was replaced"
        for layer in layers:
            for kind in ("weight", "bias"):
                # exactly tensors: quantised and sharded weights are subclasses; replicas of DataParallel hold no nn.Parameter
                if type(tensor := getattr(layer, kind)) not in (nn.Parameter, torch.Tensor):
                    return f"the {kind} of {name}'s {type(layer).__name__} is {type(tensor).__name__}, expected a plain parameter"
        if layers[0].eps != LAYER_NORM_EPS:
            return f"{name} has a LayerNorm eps of {layers[0].eps}, expected {LAYER_NORM_EPS}"
    query, key, value = _projections(owner)
    dim, channels = query.norm_weight.shape[-1], key.norm_weight.shape[-1]
    for name, projection, width in zip(PROJECTORS, (query, key, value), (dim, channels, channels)):
        shapes = [[*projection.norm_weight.shape], [*projection.weight.shape]]
        if shapes != [[width], [dim, width]]:
            return f"{name} has a LayerNorm of {shapes[0]} and a Linear of {shapes[1]}, expected [{width}] and [{dim}, {width}]"
    return None


def _differs(owner: nn.Module) -> str | None:
    """None where the method, tried on a tiny map, does what the original's does: another project may use the name for something else."""
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
                return f"{tried} does not return its first argument as it is and mined features of {list(expected.shape)}"
            # the original's very steps agree to the last bit; the room is for the same mathematics in other steps
            error, largest = (mined - expected).abs().max().item(), expected.abs().max().item()
        # whatever it is that somebody else's code does not take
        except Exception as error:
            return f"{tried} fails: {error!r}"
    if not error <= max(1e-4, 8 * torch.finfo(like.dtype).eps) * largest:
        return f"{tried} is {error:.2g} away from the original's patch info mining (largest value {largest:.2g})"
    return None


def _on_object(module: nn.Module) -> bool:
    return METHOD in vars(module) or METHOD in module._modules


def _why_not(owner: nn.Module) -> str | None:
    if _on_object(owner):
        return f"{METHOD} was set on the object, over the method of its class: not the original's"
    takes = inspect.signature(getattr(owner, METHOD))
    if len(takes.parameters) != 2:
        return f"it takes {takes}, expected two tensors"
    return _unusual(owner) or _differs(owner)


def _original_resamplers(model: nn.Module) -> Iterator[Entry]:
    owners, inner_models = [], set()
    for name, module in model.named_modules():
        # the class's own: wrappers that pass attributes through hold the model as a submodule
        if callable(getattr(type(module), METHOD, None)) or _on_object(module):
            owners.append((f"{name}.{METHOD}".lstrip("."), module))
            inner_models.add(id(_inner(module)))
    for name, module in owners:
        swap, restore = (functools.partial(change, weakref.ref(module)) for change in (_swap_class, _restore_class))
        what = f"patch info mining of {type(module).__name__}"
        if hasattr(type(module), "_mg_fast_original"):
            yield Entry(
                name, what, "already swapped by an earlier accelerate(); undo() of either report puts the original back", undo=restore
            )
        elif reason := _why_not(module):
            yield Entry(name, what, reason)
        else:
            yield Entry(name, what, "now mg_fast.ops.patch_mining with the model's own projectors", apply=swap, undo=restore)
    for name, module in model.named_modules():
        has_all = all(projector in module._modules for projector in PROJECTORS)
        if has_all and id(module) not in inner_models and not isinstance(module, PatchInfoMining):
            reason = f"no {METHOD} here that uses them: hand over the model around it, whose get_model() this is"
            yield Entry(f"{name}.{PROJECTORS[0]}".lstrip("."), f"projectors of {type(module).__name__}", reason)


def _own_mining(model: nn.Module) -> Iterator[Entry]:
    for name, module in model.named_modules():
        if isinstance(module, PatchInfoMining):
            yield Entry(name or "model", "patch info mining", "already mg_fast.modules.PatchInfoMining")


class Rule(NamedTuple):
    """One kind of thing: what it looks for, in words, and the finds in a model; a find with `apply` and `undo` can be swapped."""

    looks_for: str
    recognise: Callable[[nn.Module], Iterator[Entry]]


RULES = (
    Rule(
        f"patch info mining of the original project: a method `{METHOD}`, with {', '.join(f'`{name}`' for name in PROJECTORS)} "
        "on the same object, its get_model() or its `model`",
        _original_resamplers,
    ),
    Rule("mg_fast.modules.PatchInfoMining, where nothing is left to do", _own_mining),
)
