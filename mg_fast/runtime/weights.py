"""What whoever reads a module's weights must know: whether the module computes what they say, and whether they have changed."""

import functools
import weakref
from collections.abc import Iterable, Iterator, Set

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_modules
from torch.utils.module_tracker import ModuleTracker

from .placement import accelerate_hooks, only_placed


class Watch:
    """Notices that tensors were changed in place. It does not keep them. Inference tensors count no changes, and what is written through
    `.data` is not counted: of these it says nothing.

    A copy or a pickle of it watches nothing: what it comes with has memory of its own.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        self._seen = [(weakref.ref(t), t._version) for t in tensors if not t.is_inference()]

    def changed(self) -> bool:
        return any((tensor := seen()) is not None and tensor._version != version for seen, version in self._seen)

    def __reduce__(self):
        return Watch, ()


def global_hooks() -> str | None:
    """Says so where hooks are registered for all modules at once, which only calls of the modules run; None where there are none.

    Those of torch's ModuleTracker, by which FlopCounterMode tells modules apart, only look on. They do not count.
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


def why_not_plain(name: str, layer: nn.Module, *, placed: bool = False) -> str | None:
    """Why a call of a layer does more than its class says; None where only what is in its tensors and attributes counts.

    Args:
        name: of the layer, for the sentence.
        layer: of a class whose arithmetic is known.
        placed: take a layer as plain that accelerate has put on a device for good, around which it only moves inputs and outputs.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return f"{name} has hooks on its {type(layer).__name__}, which only a call of the module runs"
    if "forward" in vars(layer) and not (placed and only_placed(layer)):
        return f"the forward of {name}'s {type(layer).__name__} was replaced"
    return None


def uncommon(module: nn.Module, known: Set[type]) -> str | None:
    """Why a module's weights do not say what it computes, as a sentence; None where they do.

    Args:
        module: with all that is in it.
        known: types of all modules that may be in it; exactly those, as subclasses and wrappers compute something else: low-rank adapters,
            quantised layers, parametrisations.
    """
    if reason := global_hooks():
        return reason
    for name, part in module.named_modules():
        if reason := why_not_plain(name or "it", part, placed=True):
            return reason
        if part is not module and type(part) not in known:
            return f"{name} is {type(part).__module__}.{type(part).__qualname__}, expected a plain layer"
        for parameter, tensor in part.named_parameters(recurse=False):
            # a fake one is traced or compiled for
            if type(tensor) not in (nn.Parameter, FakeTensor):
                return f"{name}.{parameter} is {type(tensor).__name__}, expected a plain parameter"
    kinds = {(p.dtype, p.device) for p in module.parameters()}
    if len(kinds) > 1:
        return f"expected one dtype and one device, got {', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}"
    return None


def state(parts: Iterable[nn.Module]) -> tuple:
    """What parts of a model compute by, to be compared with `==` later: results that were kept are of no use once it has changed.

    It knows the weights with their places and versions, modules that were exchanged, hooks, replaced forwards, and low-rank adapters with
    their switches and factors. What is written through `.data`, into inference tensors or into offloaded weights is counted nowhere, and
    is not seen.
    """
    weights, kinds, hooks, special = [], [], [*torch_modules._global_forward_pre_hooks, *torch_modules._global_forward_hooks], []
    for module in _with_all_inside(parts):
        kinds.append((weakref.ref(module), type(module), module.training))
        for p in module._parameters.values():
            # What stands in for an offloaded weight is made anew after every call. The weight itself lies with the hook that loads it.
            if p is None or p.is_meta:
                continue
            # Some layouts of quantized weights have no address of their own. While a storage is referred to, its place is not another's.
            place = (StorageWeakRef(p.untyped_storage()), p.data_ptr()) if type(p) is nn.Parameter else 0
            weights.append((id(p), place, None if p.is_inference() else p._version))
        if module._forward_pre_hooks or module._forward_hooks:
            hooks += [*module._forward_pre_hooks, *module._forward_hooks]
        own = vars(module)
        if "forward" in own:
            special.append(own["forward"])
        if "_hf_hook" in own:
            special += map(id, accelerate_hooks(module))
        if _has_adapters(type(module)) or "merged_adapters" in own:
            # Low-rank adapters are switched and scaled, and merged through `.data`, which weights do not count.
            scaling = tuple(getattr(module, "scaling", {}).items())
            special.append((tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters), scaling))
    return weights, kinds, hooks, special


@functools.cache
def _has_adapters(kind: type) -> bool:
    """Whether a class of modules is one of low-rank adapters. A class that lacks an attribute is slow to say so, so it is asked once."""
    return hasattr(kind, "merged_adapters")


def _with_all_inside(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module in the parts once, without the names that `named_modules` spells for each."""
    seen, left = set(), list(parts)
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            left.extend(module._modules.values())
            yield module
