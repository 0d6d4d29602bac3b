"""Support for torch.jit.trace, torch.jit.script and torch.fx, which record a graph of a module.

None of the three follows decisions that are made in Python, and mg_fast chooses what it runs by sizes, devices and
backends. They record a plain form instead: the model's own modules, with the same result. torch.compile and
torch.export need none of this.
"""

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn
from torch.fx import Proxy


def is_recorded(*inputs) -> bool:
    """Whether torch.jit.trace or torch.fx is recording the operations on these inputs."""
    return torch.jit.is_tracing() or any(isinstance(value, Proxy) for value in inputs)


def recorded_as(plain: Callable) -> Callable[[Callable], Callable]:
    """A decorator for a method in whose place `plain` is recorded; its attribute `unrecorded` is the method itself.

    Args:
        plain: a method with the same arguments, written as far as possible in what the three can follow. It has neither
            `*args` nor keyword-only arguments, which torch.jit.script does not accept.
    """

    def decorate(method: Callable) -> Callable:
        # The function below gets the globals of another module, so it needs this module's function in its closure.
        recorded = is_recorded

        def call(self, *args, **kwargs):
            if recorded(*args, *kwargs.values()):
                return plain(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        # torch.jit.script never calls the method. It reads the source of the function in `__wrapped__`, and looks names
        # up in the globals of the function that it was given.
        if isinstance(plain, types.FunctionType):
            call = types.FunctionType(call.__code__, plain.__globals__, method.__name__, None, call.__closure__)
        functools.update_wrapper(call, method)
        call.__wrapped__ = plain
        call.__signature__ = inspect.signature(method)
        call.unrecorded = method
        return call

    return decorate


def record_call(module: nn.Module, first: Proxy, *others, **options) -> Proxy:
    """Makes torch.fx record a call of a module, as it does for torch.nn's own modules, and nothing inside it.

    Raises:
        TypeError: the module itself is being traced.
    """
    if not (path := first.tracer.path_of_module(module)):
        raise TypeError(
            f"torch.fx cannot trace {type(module).__name__} by itself, only record a call of it: trace the module that "
            "holds it, or use torch.export"
        )
    return first.tracer.create_proxy("call_module", path, (first, *others), options)
