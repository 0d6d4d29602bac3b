"""Compiling the Triton kernels for a GPU that is not here.

The operations themselves run, on fake tensors and under a driver that only names the architecture, so what is compiled, and the key it is
cached under, is what a launch on such a GPU asks for. Triton's small C launcher is not built here, because it links with the GPU's driver
library: the first launch on a machine still builds it, with the machine's C compiler, in about a second.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ... import ops
from ...errors import BackendError, CheckpointError
from ...modules import convnext_channels_last as convnext
from ...ops import interpreter
from ...ops.backend import no_triton, only_compiling, use_backend
from ...ops.reference import Projection
from .. import builtin as boxed

# pictures at once: a product of few rows has other tiles than one of many, and of the second number no published model's has few
BATCHES = (1, 64)

# kernels are kept in memory by device: with a number of its own every block asks the cache on disk
_devices = itertools.count(-1, -1)


class _Driver:
    """As much of a Triton driver as compiling needs."""

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
    """Runs mg_fast's operators, which launch, where fake tensors would have only their fakes run."""

    def __init__(self, training: bool):
        super().__init__()
        self.training = training

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.name.startswith("mg_fast::"):
            return func(*args, **(kwargs or {}))
        # the key under which torch.library.custom_op registers what an operator does
        out = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        if self.training and func is torch.ops.mg_fast.patch_mining.default:
            # the one gradient with a kernel of its own; autograd's engine does not run on CUDA tensors without a GPU
            queries, pyramid, grid = args
            with self:
                ops.pool_windows_backward(out[0], queries, pyramid, out[1], grid)
        return out


@contextlib.contextmanager
def compile_only(architecture: int, *, training: bool = False) -> Iterator[list]:
    """Within the block tensors are fake, and every Triton launch on CUDA tensors compiles for `architecture` (90: sm_90) instead.

    Pointers are taken to be multiples of 16, as those of whole tensors are; Triton's cache has another entry for others.

    Args:
        architecture: compute capability.
        training: after an operator the kernels of its gradient too, if it has any of its own.

    Yields:
        The compiled kernels, in the order of the launches.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    def mock(value):
        if isinstance(value, torch.Tensor):
            return MockTensor(value.dtype)
        if isinstance(value, tuple):
            # kernels know the fields of a named one
            return value._make(map(mock, value)) if hasattr(value, "_fields") else tuple(map(mock, value))
        return value

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *map(mock, args), grid=grid, warmup=True, **{k: mock(v) for k, v in kwargs.items()}))

    compiled, launch, active = [], JITFunction.run, driver._active
    JITFunction.run = run
    driver.set_active(_Driver(architecture))
    try:
        with only_compiling(), FakeTensorMode(), _Launching(training):
            yield compiled
    finally:
        driver.set_active(active)
        JITFunction.run = launch


class Compiled(NamedTuple):
    """A kernel that is in Triton's cache now; `seconds` is None where it already was."""

    name: str
    architecture: int
    dtype: torch.dtype
    image_size: int
    seconds: float | None


def published_configs() -> list:
    """Configurations of the published models, as far as kernels tell them apart: 768 pixels, and HD."""
    from .configuration import MiniGeminiConfig

    return [MiniGeminiConfig(image_size_aux=768), MiniGeminiConfig(image_size_aux=1536, image_grid=2, image_global=True)]


def model_config(name_or_path: str):
    """The configuration of a checkpoint folder, hub id or checkpoint of the package; weights are not needed.

    Raises:
        CheckpointError: there is none, or it does not tell the widths of the high-resolution tower.
    """
    from ..tensor_files import resolve_folder
    from .checkpoint import geometry_config

    config = geometry_config(resolve_folder(boxed.resolve(name_or_path), weights=False))
    dims = config.vision_config_aux["dims"]
    if sum(dims) != config.mm_hidden_size_aux:
        raise CheckpointError(
            f"{name_or_path}: config.json says mm_hidden_size_aux={config.mm_hidden_size_aux} and not the widths that add up to it; "
            f"without vision_config_aux or the tower's tensors they would be {dims}"
        )
    return config


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    from triton import knobs

    return knobs.cache.dir


def warm_up(
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    configs: Sequence | None = None,
    *,
    training: bool = False,
    backend: str = "auto",
) -> Iterator[Compiled]:
    """Fills Triton's cache (TRITON_CACHE_DIR) with the kernels that models of these configurations launch, for one picture or many.

    Args:
        architectures: compute capabilities, 90 for sm_90.
        dtypes: of the models' weights.
        configs: MiniGeminiConfigs; by default those of the published models.
        training: the kernels of the backward pass too.
        backend: of the models: `auto`; or `triton` for those kernels too in whose place `auto` takes a library's.

    Yields:
        One `Compiled` a kernel, as it is done.

    Raises:
        BackendError: this process cannot compile kernels.
    """
    check()
    from triton import knobs

    def listener(src, metadata, metadata_group, times, cache_hit):
        # of the times, in microseconds
        events.append((src.name, None if cache_hit else times.total / 1e6))

    for architecture, dtype, config in itertools.product(architectures, dtypes, published_configs() if configs is None else configs):
        events: list = []
        previous, knobs.compilation.listener = knobs.compilation.listener, listener
        try:
            with compile_only(architecture, training=training), use_backend(backend):
                resize(config)
                for batch in BATCHES:
                    see(config, dtype, batch=batch, training=training)
        finally:
            knobs.compilation.listener = previous
        for name, seconds in events:
            yield Compiled(name, architecture, dtype, config.image_size_aux, seconds)


def check() -> None:
    """Raises `BackendError` with the reason where kernels cannot be compiled here."""
    # not whether they run here: a GPU of this machine says nothing of the one that they are for
    reason = no_triton()
    if reason is None and interpreter.requested():
        reason = f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} is set, under which kernels are interpreted: unset it"
    if reason:
        raise BackendError(f"kernels cannot be compiled: {reason}")


def resize(config) -> None:
    """Both resolutions of a decoded picture; for use within `compile_only`. The kernels are the same for every picture and model."""
    picture = torch.empty(480, 640, 3, dtype=torch.uint8, device="cuda")
    ops.dual_resize(
        picture, config.image_size_aux, config.vision_config.image_size, grid=config.image_grid, global_view=config.image_global
    )


def see(config, dtype: torch.dtype, *, batch: int = 1, training: bool = False) -> None:
    """The high-resolution tower and patch info mining on CUDA tensors of a model's shapes and layouts; for use within `compile_only`."""
    dims, like = config.vision_config_aux["dims"], {"dtype": dtype, "device": "cuda", "requires_grad": training}
    width, size = config.vision_config.hidden_size, config.image_size_aux

    def projection(channels: int) -> Projection:
        vector = torch.empty(channels, **like)
        return Projection(vector, vector, torch.empty(width, channels, **like), torch.empty(width, **like))

    queries = torch.empty(batch, config.views, config.tokens_per_view, width, **like)
    pixels = torch.empty(batch, 3, size, size, dtype=dtype, device="cuda")
    with torch.set_grad_enabled(training):
        # the blocks of a stage are alike
        pyramid = convnext.run_tower(*convnext.empty_tower(dims, [1] * len(dims), **like), pixels)
        ops.patch_mining(queries, pyramid, projection(width), projection(sum(dims)), projection(sum(dims)), grid=config.image_grid)
