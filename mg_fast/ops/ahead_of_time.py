"""Compiles the Triton kernels for a GPU that this machine does not have.

The operations themselves run, on fake tensors and under a driver that only names the architecture. What is compiled,
and the key that it is cached under, is therefore what a launch on such a GPU asks for. Triton's small C launcher is not
built here, because it links with the GPU's driver library. The first launch on a machine still builds it, with the
machine's C compiler, in about a second.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BackendError
from . import interpreter
from .backend import no_triton, only_compiling
from .pooled_windows import pool_windows_backward

# Triton keeps kernels in memory by device number. Each block uses a number of its own, so that it asks the disk cache.
_devices = itertools.count(-1, -1)


class Compiled(NamedTuple):
    """A kernel that is now in Triton's cache. `seconds` is None where it already was there."""

    name: str
    architecture: int
    dtype: torch.dtype
    image_size: int
    seconds: float | None


class _Driver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.device = next(_devices)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


class _Launching(TorchDispatchMode):
    """Runs mg_fast's operators, so that they launch their kernels; fake tensors alone would run only their fakes."""

    def __init__(self, training: bool):
        super().__init__()
        self.training = training

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.name.startswith("mg_fast::"):
            return func(*args, **(kwargs or {}))
        # torch.library.custom_op registers the body of an operator under this key.
        out = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        if self.training and func is torch.ops.mg_fast.patch_mining.default:
            # Only this gradient has a kernel. Autograd's engine does not run on CUDA tensors without a GPU.
            queries, pyramid, *rest = args
            with self:
                pool_windows_backward(out[0], queries, pyramid, out[1], *rest)
        return out


@contextlib.contextmanager
def compile_only(architecture: int, *, training: bool = False) -> Iterator[list]:
    """Within the block tensors are fake, and a Triton launch on CUDA tensors compiles for `architecture` instead.

    Pointers are assumed to be multiples of 16, as the pointers of whole tensors are. Triton's cache has another entry
    for other pointers.

    Args:
        architecture: compute capability; 90 stands for sm_90.
        training: also compile the kernels of an operator's gradient, if the gradient has kernels of its own.
    Yields:
        The compiled kernels, in the order of the launches.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    def mock(value):
        if isinstance(value, torch.Tensor):
            return MockTensor(value.dtype)
        if isinstance(value, tuple):
            # Kernels use the field names of a named tuple.
            return value._make(map(mock, value)) if hasattr(value, "_fields") else tuple(map(mock, value))
        return value

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append(
            launch(self, *map(mock, args), grid=grid, warmup=True, **{k: mock(v) for k, v in kwargs.items()})
        )

    compiled, launch, active = [], JITFunction.run, driver._active
    JITFunction.run = run
    driver.set_active(_Driver(architecture))
    try:
        with only_compiling(), FakeTensorMode(), _Launching(training):
            yield compiled
    finally:
        driver.set_active(active)
        JITFunction.run = launch


def compile_launches(
    launch: Callable[[], None], architecture: int, *, training: bool = False
) -> list[tuple[str, float | None]]:
    """Compiles the kernels that a function launches on fake CUDA tensors, into Triton's cache.

    Args:
        launch: runs operations of mg_fast.
        architecture, training: as in `compile_only`.

    Returns:
        The name of every kernel in the order of its first launch, and the seconds that its compilation took; None where
        it was in the cache.
    """
    from triton import knobs

    def listener(src, metadata, metadata_group, times, cache_hit):
        # Triton reports times in microseconds.
        events.append((src.name, None if cache_hit else times.total / 1e6))

    events: list[tuple[str, float | None]] = []
    previous, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        with compile_only(architecture, training=training):
            launch()
    finally:
        knobs.compilation.listener = previous
    return events


def check_can_compile() -> None:
    """Raises `BackendError` with the reason where kernels cannot be compiled here."""
    # A GPU of this machine says nothing about the GPU to compile for, so whether kernels run here does not matter.
    reason = no_triton()
    if reason is None and interpreter.requested():
        reason = (
            f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} is set, under which kernels are interpreted: unset it"
        )
    if reason:
        raise BackendError(f"kernels cannot be compiled: {reason}")


def cache_folder() -> str:
    """The folder where Triton keeps the kernels that it compiled."""
    from triton import knobs

    return knobs.cache.dir
