"""Compiling the Triton kernels for a GPU that is not here.

The launchers themselves run, on fake tensors and under a driver that only names the architecture, so what is compiled, and the key it is
cached under, is what a launch on such a GPU asks for. Triton's small C launcher is not built here, because it links with the GPU's driver
library: the first launch on a machine still builds it, with the machine's C compiler, in about a second.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses import FakeTensorMode


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        # kernels are kept by device: one number for each architecture
        return -self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def compile_only(architecture: int) -> Iterator[list]:
    """Within the block tensors are fake, and every Triton launch on CUDA tensors compiles for `architecture` (90: sm_90) instead.

    Yields:
        The compiled kernels, in the order of the launches.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    def mock(value):
        if isinstance(value, torch.Tensor):
            return MockTensor(value.dtype)
        if isinstance(value, tuple):
            values = [mock(v) for v in value]
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        return value

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *map(mock, args), grid=grid, warmup=True, **{k: mock(v) for k, v in kwargs.items()}))

    compiled, launch, active = [], JITFunction.run, driver._active
    JITFunction.run = run
    driver.set_active(_Driver(architecture))
    try:
        with FakeTensorMode():
            yield compiled
    finally:
        driver.set_active(active)
        JITFunction.run = launch
