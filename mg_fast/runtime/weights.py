"""Tells code that reads a module's weights whether the module computes only what they say, and whether they changed."""

import functools
import weakref
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_modules
from torch.utils.module_tracker import ModuleTracker

from .placement import accelerate_hooks, only_placed

# Exactly these types count as plain. Quantized and sharded weights are subclasses, whose memory cannot be read as it
# is. Replicas of DataParallel and calls by torch.func.functional_call have plain tensors in place of parameters. A fake
# tensor occurs in traces and compilation.
_PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def why_all_modules_are_hooked() -> str | None:
    """A sentence if hooks are registered for all modules at once, which only calls of the modules run; otherwise None.

    The hooks of torch's ModuleTracker, by which FlopCounterMode tells modules apart, only observe and do not count.
    """
    for registered in (
        torch_modules._global_forward_pre_hooks,
        torch_modules._global_forward_hooks,
        torch_modules._global_backward_pre_hooks,
        torch_modules._global_backward_hooks,
    ):
        for hook in registered.values():
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                return "hooks are registered for all modules, which only calls of the modules run"
    return None


def why_not_plain(
    name: str,
    layer: nn.Module,
    *,
    known: Collection[type] | None = None,
    reads: Collection[str] | None = None,
    placed: bool = False,
) -> str | None:
    """Why a call of one layer does more than its class and its tensors say, as a sentence; None where it does not.

    Modules inside the layer are not examined (see `why_more_than_weights`).

    Args:
        name: name of the layer in the sentence.
        layer: the module.
        known: the classes whose arithmetic the caller knows. A subclass is not accepted, because it computes something
            else. None accepts any class.
        reads: attributes that the caller reads and that must be plain tensors; empty if the layer's own forward runs,
            as in a CUDA graph that was captured of it. None stands for all parameters of the layer.
        placed: accept a layer that accelerate has put on a device for good, around which it only moves inputs and
            outputs between devices. The caller must then bring the input to the layer's device.
    """
    return why_all_modules_are_hooked() or _why_not_plain(name, layer, known, reads, placed)


def why_more_than_weights(
    module: nn.Module, known: Collection[type] | None, *, called: bool = False, placed: bool = False
) -> str | None:
    """Why a module, with everything inside it, computes something other than its weights say; None where it does not.

    The reason is a sentence.

    Args:
        module: the module; its weights are expected in one dtype and on one device.
        known: the classes that may be in it, including its own. Subclasses and wrappers are not accepted, because they
            compute something else (low-rank adapters, quantized layers, parametrizations). None if the caller checks
            the classes.
        called: the module itself is called and only the modules inside it are read, so its own hooks, forward and class
            are not examined.
        placed: see `why_not_plain`.
    """
    if reason := why_all_modules_are_hooked():
        return reason
    kinds = set()
    for name, part in module.named_modules():
        if called and part is module:
            continue
        if reason := _why_not_plain(name or "it", part, known, None, placed):
            return reason
        kinds.update((tensor.dtype, tensor.device) for tensor in _parameters(part))
    if len(kinds) > 1:
        places = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"expected one dtype and one device, got {places}"
    return None


def _why_not_plain(
    name: str, layer: nn.Module, known: Collection[type] | None, reads: Collection[str] | None, placed: bool
) -> str | None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return f"{name} has hooks on its {type(layer).__name__}, which only a call of the module runs"
    if "forward" in vars(layer) and not (placed and only_placed(layer)):
        return f"the forward of {name}'s {type(layer).__name__} was replaced"
    if known is not None and type(layer) not in known:
        return f"{name} is {type(layer).__module__}.{type(layer).__qualname__}, expected a plain layer"
    tensors = _named_parameters(layer) if reads is None else ((kind, getattr(layer, kind)) for kind in reads)
    for kind, tensor in tensors:
        if type(tensor) not in _PLAIN_TENSORS:
            return (
                f"the {kind} of {name}'s {type(layer).__name__} is {type(tensor).__name__}, expected a plain parameter"
            )
    return None


def _named_parameters(layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters of a layer itself; a replica of DataParallel keeps them in another attribute."""
    named = vars(layer).get("_former_parameters") or layer._parameters
    return [(kind, tensor) for kind, tensor in named.items() if tensor is not None]


def _parameters(layer: nn.Module) -> list[torch.Tensor]:
    return [tensor for _, tensor in _named_parameters(layer)]


class Fingerprint:
    """A record of everything that modules compute with, at one moment.

    Two are equal if results that were computed at one moment still hold at the other. The record covers weights with
    their places and versions, exchanged modules, hooks, replaced forwards, and low-rank adapters with their switches
    and factors. Writes through `.data`, into inference tensors or into offloaded weights are counted nowhere, so they
    are not seen. The record keeps no weight alive. Making one visits every module, which takes milliseconds for a large
    model.

    A copy or a pickle of a record is empty, because the modules that are copied with it have memory of their own.

    Args:
        parts: the modules, with everything inside them.

    Attributes:
        places: where the weights lie; it changes when they are moved, converted or replaced.
    """

    def __init__(self, parts: Iterable[nn.Module] = ()):
        places, weights, modules, special = [], [], [], []
        hooks = [*torch_modules._global_forward_pre_hooks, *torch_modules._global_forward_hooks]
        # These weights can later be asked by themselves whether they were written.
        watched: list[tuple[weakref.ref, int]] = []
        for module in _with_all_inside(parts):
            modules.append((weakref.ref(module), type(module), module.training))
            for weight in module._parameters.values():
                # The tensor that stands for an offloaded weight is made anew after every call. The weight itself is
                # kept by the hook that loads it.
                if weight is None or weight.is_meta:
                    continue
                # Some layouts of quantized weights have no address of their own. A reference to a storage keeps its
                # address from being reused.
                plain = type(weight) is nn.Parameter
                places.append((StorageWeakRef(weight.untyped_storage()), weight.data_ptr()) if plain else 0)
                version = None if weight.is_inference() else weight._version
                weights.append((id(weight), version))
                if version is not None:
                    watched.append((weakref.ref(weight), version))
            if module._forward_pre_hooks or module._forward_hooks:
                hooks += [*module._forward_pre_hooks, *module._forward_hooks]
            own = vars(module)
            if "forward" in own:
                special.append(own["forward"])
            if "_hf_hook" in own:
                special += map(id, accelerate_hooks(module))
            if _has_adapters(type(module)) or "merged_adapters" in own:
                # Low-rank adapters are switched, scaled, and merged through `.data`, which the weights do not count.
                scaling = tuple(getattr(module, "scaling", {}).items())
                special.append(
                    (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters), scaling)
                )
        self.places, self._watched = places, watched
        self._facts = weights, places, modules, hooks, special

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._facts == other._facts

    __hash__ = None

    def __reduce__(self):
        return Fingerprint, ()

    def weights_written(self) -> bool:
        """Whether a weight was changed in place since the record was made.

        This asks the weights themselves and takes microseconds. It ignores weights that were deleted, moved or
        converted.
        """
        return any((tensor := weight()) is not None and tensor._version != version for weight, version in self._watched)


@functools.cache
def _has_adapters(kind: type) -> bool:
    """Whether a class of modules holds low-rank adapters.

    The answer is cached, because a class that lacks an attribute is slow to say so.
    """
    return hasattr(kind, "merged_adapters")


def _with_all_inside(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module in the parts once, without building the names that `named_modules` builds."""
    seen, left = set(), list(parts)
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            left.extend(module._modules.values())
            yield module
