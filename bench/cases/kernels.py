"""Each kernel alone, at the shapes that ConvNeXt-L gives it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mg_fast import ops

from ..registry import DTYPES, Call, Case, Cost
from .settings import DIMS, SETTINGS, compiled, own_graphs, require


@dataclass
class Inputs:
    device: str
    tensors: tuple[torch.Tensor, ...]


def cases() -> list[Case]:
    found = []
    for dtype in DTYPES:
        for batch in (1, 8):
            for setting in SETTINGS:
                for stage, channels in enumerate(DIMS):
                    side = setting.side // 4 >> stage
                    name = f"{setting.side}-stage{stage}-b{batch}-{dtype}"
                    # small enough for a CPU; the rest is for GPUs
                    devices = ("cpu", "cuda") if (batch, dtype, setting.grid) == (1, "float32", 1) else ("cuda",)
                    shape = (batch, side, side, channels)
                    found += [
                        operation(name, shape, getattr(torch, dtype), devices) for operation in (_convolution, _expansion, _contraction)
                    ]
    # by operation, what the published models run in first
    return sorted(found, key=lambda case: case.group)


def _convolution(name: str, shape: tuple[int, ...], dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    channels, pixels = shape[-1], shape[0] * shape[1] * shape[2]
    least = Cost(2 * 49 * pixels * channels, (2 * pixels + 52) * channels * dtype.itemsize)
    return _case(f"dwconv_norm/{name}", ops.dwconv_norm, "dwconv_norm", [shape, (49, channels), *[(channels,)] * 3], dtype, least, devices)


def _expansion(name: str, shape: tuple[int, ...], dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    channels, pixels = shape[-1], shape[0] * shape[1] * shape[2]
    least = Cost(8 * pixels * channels**2, (5 * pixels * channels + 4 * channels**2 + 4 * channels) * dtype.itemsize)
    shapes = [(pixels, channels), (4 * channels, channels), (4 * channels,)]
    return _case(f"linear_gelu/{name}", ops.linear_gelu, "linear_gelu", shapes, dtype, least, devices)


def _contraction(name: str, shape: tuple[int, ...], dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    channels, pixels = shape[-1], shape[0] * shape[1] * shape[2]
    least = Cost(8 * pixels * channels**2, (6 * pixels * channels + 4 * channels**2 + channels) * dtype.itemsize)
    shapes = [(pixels, 4 * channels), (channels, 4 * channels), (channels,), (pixels, channels)]
    return _case(f"linear_residual/{name}", ops.linear_residual, "linear_residual", shapes, dtype, least, devices)


def _case(name: str, operation: Callable, registered: str, shapes: list, dtype: torch.dtype, least: Cost, devices: tuple[str, ...]) -> Case:
    def make(device: str) -> Inputs:
        torch.manual_seed(0)
        # weights as small as trained ones: results keep the size of what goes in
        scales = [1.0 if i in (0, 3) else shape[-1] ** -0.5 for i, shape in enumerate(shapes)]
        return Inputs(device, tuple((torch.randn(shape, device=device) * scale).to(dtype) for shape, scale in zip(shapes, scales)))

    def provider(backend: str) -> Callable[[Inputs], Call]:
        def build(inputs: Inputs) -> Call:
            require(registered, backend, inputs.device)
            return lambda: operation(*inputs.tensors, backend=backend)

        return build

    def exact(inputs: Inputs) -> torch.Tensor:
        return operation(*(tensor.double() for tensor in inputs.tensors), backend="reference")

    providers = {"reference": provider("reference"), **compiled(provider("torch"), "torch")}
    providers |= {"torch": provider("torch"), "triton": provider("triton")}
    work = {"triton": least}
    return Case(
        name, make, providers, exact, least=least, work=work, devices=devices, capturable="-b1-" in name, own_graphs=own_graphs(providers)
    )
