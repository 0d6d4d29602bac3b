"""Libraries that compute deformable attention, the opponents of this project's kernel.

None of them is required: a provider of one that is not here says so. Each takes the sizes of the levels and their
first pixels as tensors, which are made before the call that is timed.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import huggingface_hub.constants
import torch

from ..registry import NotHere

HUB_KERNEL = "kernels-community/deformable-detr"
# The original's default; a launch takes so many samples of a batch, which it must divide.
MOST_TOGETHER = 64
# From value [B, S, H, D], locations and weights to the result [B, Q, H * D].
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def deformops_sampler(levels: Sequence[tuple[int, int]], device: str) -> Sampler:
    """`msda` of deformops 3, whose Triton kernels take 16 bits and locations in float32."""
    msda = _attribute(_imported("deformops.registry"), "msda")
    sizes, starts = _level_tensors(levels, device)

    def sample(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return msda(value, sizes, starts, locations, weights)

    return sample


def extension_sampler(module: ModuleType, levels: Sequence[tuple[int, int]], device: str) -> Sampler:
    """Deformable DETR's own CUDA kernel, from a module that has its two functions."""
    read, read_backward = (_attribute(module, f"ms_deform_attn_{name}") for name in ("forward", "backward"))
    sizes, starts = _level_tensors(levels, device)

    class Sampled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, locations, weights):
            ctx.save_for_backward(value, locations, weights)
            return read(value, sizes, starts, locations, weights, min(len(value), MOST_TOGETHER))

        @staticmethod
        def backward(ctx, gradient):
            value, locations, weights = ctx.saved_tensors
            together = min(len(value), MOST_TOGETHER)
            return tuple(read_backward(value, sizes, starts, locations, weights, gradient.contiguous(), together))

    return Sampled.apply


def require_float32_on_gpu(device: str, dtype: torch.dtype) -> None:
    """Raises NotHere where Deformable DETR's kernel cannot run."""
    if device == "cpu":
        raise NotHere("it is for GPUs")
    if dtype != torch.float32:
        raise NotHere("it takes float32, and converting 16 bits before it would not be its own time")


def cuda_extension() -> ModuleType:
    """The extension that Deformable DETR and MM-Interleaved build."""
    return _imported("MultiScaleDeformableAttention")


def hub_kernel() -> ModuleType:
    """The kernel that transformers takes from the Hugging Face Hub, from the local cache alone."""
    get_kernel = _attribute(_imported("kernels"), "get_kernel")
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return get_kernel(HUB_KERNEL, version=1)
    except Exception as error:
        # The package has many errors for a kernel that is not in the cache, or not built for this machine.
        raise NotHere(f"{HUB_KERNEL} is not in the local cache for this machine: {error}") from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        # An extension that was built for another torch raises more than ImportError.
        raise NotHere(f"{name} cannot be imported: {error}") from error


def _attribute(module: ModuleType, name: str) -> Callable:
    """A function of a module. A folder of the same name, which Python imports too, does not have it."""
    if not hasattr(module, name):
        raise NotHere(f"{module.__name__} has no {name}")
    return getattr(module, name)


def _level_tensors(levels: Sequence[tuple[int, int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The sizes [L, 2] as (h, w) of the levels and their first pixels [L], as those libraries take them."""
    sizes = torch.tensor(levels, device=device)
    pixels = sizes.prod(1)
    return sizes, pixels.cumsum(0) - pixels
