"""What the files of single operations share: a case and a launch made of an operation's name and the shapes of its
tensors.

A file named after a file of mg_fast/ops has `cases()`, the sizes that are timed, and `launches()`, small calls of each
of its kernels for `python -m bench smoke`. The providers are the forms that the operation's record has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mg_fast import ops
from mg_fast.ops.backend import BACKENDS
from mg_fast.ops.operation import OPERATIONS

from ..registry import DTYPES, Call, Case, Cost
from .settings import DIMS, SETTINGS, compiled, own_graphs, require


@dataclass
class OperationInputs:
    device: str
    tensors: tuple[torch.Tensor, ...]


class Launch(NamedTuple):
    """A small call of an operation: its inputs in a dtype, and from them and a backend to the outputs of our kernels
    alone.
    """

    make: Callable[[torch.dtype], Any]
    run: Callable[[Any, str], list[torch.Tensor]]


@dataclass(frozen=True)
class StageMap:
    """A map of ConvNeXt-L [batch, side, side, channels] in a dtype.

    Attributes:
        name: of the case that is made of it.
        devices: where it is measured unasked.
    """

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


def stage_maps() -> Iterator[StageMap]:
    """The maps of ConvNeXt-L's stages, what the published models run in first."""
    for dtype in DTYPES:
        for batch in (1, 8):
            for setting in SETTINGS:
                for stage, channels in enumerate(DIMS):
                    side = setting.side // 4 >> stage
                    # small enough for a CPU; the rest is for GPUs
                    devices = ("cpu", "cuda") if (batch, dtype, setting.grid) == (1, "float32", 1) else ("cuda",)
                    name = f"{setting.side}-stage{stage}-b{batch}-{dtype}"
                    yield StageMap(name, (batch, side, side, channels), getattr(torch, dtype), devices)


def forms(operation: str, call: Callable[[Any, str], Call]) -> dict[str, Callable[[Any], Call]]:
    """A provider for each form that the operation's record has, the reference first.

    Args:
        operation: its name.
        call: from the inputs and a backend to the call that is timed.
    """

    def provider(backend: str) -> Callable[[Any], Call]:
        def build(inputs: Any) -> Call:
            require(operation, backend, inputs.device)
            return call(inputs, backend)

        return build

    return {backend: provider(backend) for backend in BACKENDS if backend in OPERATIONS[operation].forms}


def tensors_case(operation: str, stage_map: StageMap, shapes: list[tuple[int, ...]], least: Cost) -> Case:
    """A case of an operation that takes random tensors of these shapes, the first and the fourth as large as what a
    network computes.
    """

    def make(device: str) -> OperationInputs:
        torch.manual_seed(0)
        # weights as small as trained ones: results keep the size of what goes in
        scales = [1.0 if i in (0, 3) else shape[-1] ** -0.5 for i, shape in enumerate(shapes)]
        tensors = (
            (torch.randn(shape, device=device) * scale).to(stage_map.dtype) for shape, scale in zip(shapes, scales)
        )
        return OperationInputs(device, tuple(tensors))

    def exact(inputs: OperationInputs) -> torch.Tensor:
        return function(*(tensor.double() for tensor in inputs.tensors), backend="reference")

    function = getattr(ops, operation)
    plain = forms(operation, lambda inputs, backend: lambda: function(*inputs.tensors, backend=backend))
    providers = {"reference": plain["reference"], **compiled(plain["torch"], "torch"), **plain}
    return Case(
        f"{operation}/{stage_map.name}",
        make,
        providers,
        exact,
        least=least,
        work={"triton": least},
        devices=stage_map.devices,
        capturable=stage_map.shape[0] == 1,
        own_graphs=own_graphs(providers),
    )


def tensors_launch(operation: str, *shapes: tuple[int, ...]) -> Launch:
    """A launch of an operation that takes random tensors of these shapes."""
    return Launch(
        lambda dtype: [(torch.randn(shape) / 8).to(dtype) for shape in shapes],
        lambda tensors, backend: [getattr(ops, operation)(*tensors, backend=backend)],
    )
