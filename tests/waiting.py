"""A guard against waiting for a GPU, which also works where there is none."""

import contextlib
import math
import unittest.mock
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Calls by which the host waits for values of a tensor, or brings values to the GPU.
METHODS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
FUNCTIONS = ("nonzero", "tensor", "equal")
# Operations that those calls become, and others whose result's size depends on values.
OPERATIONS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")


@contextlib.contextmanager
def no_waiting(most: float = math.inf) -> Iterator[None]:
    """Within the block everything fails that waits for values of a tensor, as nothing may in a CUDA graph.

    Args:
        most: elements of the largest tensor that may be made.
    """

    def refuse(*_, **__):
        raise AssertionError("the host waits for a tensor's values")

    with contextlib.ExitStack() as patches:
        for owner, names in ((torch.Tensor, METHODS), (torch, FUNCTIONS)):
            for name in names:
                patches.enter_context(unittest.mock.patch.object(owner, name, refuse))
        with _Watching(most):
            yield


class _Watching(TorchDispatchMode):
    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name.startswith(OPERATIONS):
            raise AssertionError(f"{name} waits for the device")
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() // tensor.itemsize > self.most:
                raise AssertionError(f"{name} makes {list(tensor.shape)}")
        return out
