"""Makes and undoes a swap.

A swap exchanges the object's class for a subclass and sets nothing on the object. `self` therefore stays the called
object, also in deep copies, pickles and the replicas of DataParallel, and the object's own state is untouched.
"""

import functools
import types
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ...errors import MgFastError
from ...runtime.recording import recorded_as
from .report import Finding

# From an object's class to the methods of its subclass, by name. It must be a module-level function, so that pickle
# finds it.
Methods = Callable[[type], dict[str, Callable]]


def offer(
    name: str, what: str, module: nn.Module, methods: Methods, why_not: Callable[[nn.Module], str | None], becomes: str
) -> Finding:
    """A finding that was swapped already, that is left alone because of `why_not(module)`, or that can be swapped."""
    # The reference is weak because a report must not keep the model alive.
    reference = weakref.ref(module)
    restore = functools.partial(_restore, reference)
    if hasattr(type(module), "_mg_fast_original"):
        reason = "already swapped by an earlier accelerate(); undo() of either report puts the original back"
        return Finding(name, what, reason, undo=restore)
    if reason := why_not(module):
        return Finding(name, what, reason)
    return Finding(name, what, becomes, apply=functools.partial(_swap, reference, methods), undo=restore)


def replaced_on_object(module: nn.Module, method: str) -> bool:
    """Whether the object has an attribute of its own in place of its class's method."""
    return method in vars(module) or method in module._modules


def warn(message: str) -> None:
    """Warns where the swapped method was called.

    Python shows the warning once, for any number of objects and calls.
    """
    # A graph of torch.compile cannot contain a warning.
    if not torch.compiler.is_compiling():
        # Two frames lie between this function and the caller: the swapped method, and the wrapper of `recorded_as`.
        warnings.warn(f"mg_fast.accelerate: {message}", RuntimeWarning, stacklevel=4)


@functools.cache
def _exchanged(original: type, methods: Methods) -> type:
    def __reduce_ex__(self, protocol):
        # pickle finds classes by name, and the name of this class is the original's.
        make, (_, *arguments), *state = super(_exchanged(original, methods), self).__reduce_ex__(protocol)
        return _remake, (original, methods, make, *arguments), *state

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    recorded = {name: recorded_as(getattr(original, name))(method) for name, method in methods(original).items()}
    own = recorded | {"__reduce_ex__": __reduce_ex__, "_mg_fast_original": original}
    return types.new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(names | own))


def _remake(original: type, methods: Methods, make: Callable, *arguments):
    return make(_exchanged(original, methods), *arguments)


def _swap(reference: weakref.ref, methods: Methods) -> None:
    module = reference()
    module.__class__ = _exchanged(type(module), methods)


def _restore(reference: weakref.ref) -> None:
    module = reference()
    if not hasattr(type(module), "_mg_fast_original"):
        return
    if "_mg_fast_original" not in vars(type(module)):
        raise MgFastError(f"its class was exchanged again since, for {type(module).__name__}: undo that first")
    module.__class__ = type(module)._mg_fast_original
