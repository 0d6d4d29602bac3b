"""What the files of single operations share: cases, launches and tuning, made of names and shapes of tensors.

A file named after a file of mg_fast/ops has `cases()`, the sizes that are timed; `launches()`, small calls of each of
its kernels for `python -m bench smoke`; and `tunable()`, where `python -m bench tune` can search for its tiles. The
providers are the forms that the operation's record has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from mg_fast import ops
from mg_fast.ops.backend import BACKENDS
from mg_fast.ops.operation import OPERATIONS

from ..registry import DTYPES, Call, Case, Cost, Provider
from .settings import DIMS, SETTINGS, compiled, require


@dataclass
class OperationInputs:
    device: str
    tensors: tuple[torch.Tensor, ...]


# The dtypes that most kernels are launched in: one of 16 bits, and float32.
BOTH = (torch.bfloat16, torch.float32)


class Launch(NamedTuple):
    """A small call of an operation: makes inputs of a dtype, and runs a backend's kernels alone on them.

    Only a launch that is `repeatable` gives the same bits again. One that adds with atomics does not. Its kernels take
    the `dtypes`.
    """

    make: Callable[[torch.dtype], Any]
    run: Callable[[Any, str], list[torch.Tensor]]
    repeatable: bool = True
    dtypes: tuple[torch.dtype, ...] = BOTH


@dataclass(frozen=True)
class Tunable:
    """What can be tuned of a kernel whose table in configs.py has the name of its file.

    Args:
        space: by field of its tile, the values that may be tried.
        fits: whether a tile can run, by its key and the bytes of shared memory of a block.
        problems: the kernel at the published shapes, what most models run in first: the keys of the entries that tiles
            are taken from, each with a case that has the providers `triton` and `torch`, the library's form.
        prepare: makes and keeps the tables that a launch computes on the CPU, which cannot be computed among fake
            tensors.
        library_graphed: whether the library's form can be captured in a CUDA graph. Otherwise its time includes the
            host's launches.
    """

    space: Mapping[str, Sequence[int]]
    fits: Callable[[Any, Any, int], bool]
    problems: Callable[[], list[tuple[object, Case]]]
    prepare: Callable[[], None] | None = None
    library_graphed: bool = True


# The 32-bit accumulators and rows that one thread may hold in registers.
MOST_REGISTERS = 128
POWERS = tuple(2**i for i in range(11))


@dataclass(frozen=True)
class StageMap:
    """A map of ConvNeXt-L [batch, side, side, channels] in a dtype, with the name and the devices of its case."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    devices: tuple[str, ...]

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def channels(self) -> int:
        return self.shape[-1]


def stage_maps(dtypes: Sequence[str] = DTYPES, batches: Sequence[int] = (1, 8)) -> Iterator[StageMap]:
    """The maps of ConvNeXt-L's stages, by dtype, batch and picture size."""
    for dtype in dtypes:
        for batch in batches:
            for setting in SETTINGS:
                for stage, channels in enumerate(DIMS):
                    side = setting.side // 4 >> stage
                    # These are small enough for a CPU; the rest is for GPUs.
                    devices = ("cpu", "cuda") if (batch, dtype, setting.grid) == (1, "float32", 1) else ("cuda",)
                    name = f"{setting.side}-stage{stage}-b{batch}-{dtype}"
                    yield StageMap(name, (batch, side, side, channels), getattr(torch, dtype), devices)


def forms(operation: str, call: Callable[[Any, str], Call]) -> dict[str, Callable[[Any], Call]]:
    """A provider for each form in the operation's record, the reference first; `call` takes inputs and a backend."""

    def build(backend: str, inputs: Any) -> Call:
        require(operation, backend, inputs.device)
        return call(inputs, backend)

    return {backend: partial(build, backend) for backend in BACKENDS if backend in OPERATIONS[operation].forms}


def tensors_case(operation: str, stage_map: StageMap, shapes: Sequence[tuple[int, ...]], least: Cost) -> Case:
    """A case of an operation that takes random tensors of these shapes.

    The first and the fourth are as large as what a network computes, the others as small as trained weights, so that
    results keep the size of what goes in.
    """

    def make(device: str) -> OperationInputs:
        torch.manual_seed(0)
        scales = [1.0 if i in (0, 3) else shape[-1] ** -0.5 for i, shape in enumerate(shapes)]
        tensors = ((torch.randn(s, device=device) * scale).to(stage_map.dtype) for s, scale in zip(shapes, scales))
        return OperationInputs(device, tuple(tensors))

    def exact(inputs: OperationInputs) -> torch.Tensor:
        return function(*(tensor.double() for tensor in inputs.tensors), backend="reference")

    function = getattr(ops, operation)
    plain = forms(operation, lambda inputs, backend: lambda: function(*inputs.tensors, backend=backend))
    providers = {"reference": plain["reference"], **compiled(plain["torch"], "torch"), **plain}
    providers["triton"] = Provider(plain["triton"], work=least)
    return Case(
        f"{operation}/{stage_map.name}",
        make,
        providers,
        exact,
        least=least,
        devices=stage_map.devices,
        capturable=stage_map.shape[0] == 1,
    )


def tensors_launch(operation: str, *shapes: tuple[int, ...]) -> Launch:
    """A launch of an operation that takes random tensors of these shapes."""
    return Launch(
        lambda dtype: [(torch.randn(shape) / 8).to(dtype) for shape in shapes],
        lambda tensors, backend: [getattr(ops, operation)(*tensors, backend=backend)],
    )
