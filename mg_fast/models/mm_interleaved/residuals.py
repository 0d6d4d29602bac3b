"""Residuals of the U-Net that are computed from the tensors that they are added to."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class Residual:
    """Stands for a tensor in a sum: `x + Residual(f)` is `x + f(x)`.

    diffusers' U-Nets take residuals for their skip tensors and for the mid block's output, as a ControlNet gives them
    (`down_block_additional_residuals`, `mid_block_additional_residual`), and add them after the down path and after the
    mid block. A ControlNet computes them beforehand. A synchronizer computes them from the very tensors that they are
    added to, which exist only within the U-Net's call. An object of this class is passed in place of such a tensor, and
    torch hands the sum over to it by `__torch_function__`, its public protocol for objects that take a tensor's place.

    In this way the U-Net stays diffusers' own class with its own forward and names, nothing is hooked or exchanged, no
    state is kept between calls, and a call can be captured in a CUDA graph or traced by torch.compile without a break.
    Hooks on the mid block and the up blocks would need state for the length of a call, and a subclass would repeat the
    library's forward. Whatever else a later release may do with a residual raises a TypeError here.

    Args:
        function: returns what is added to a tensor.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", None)
        if name in ("add", "__add__", "__radd__", "add_", "__iadd__") and len(args) == 2 and not kwargs:
            first, second = args
            if isinstance(second, cls) and isinstance(first, torch.Tensor):
                return first + second.function(first)
        raise TypeError(f"a residual of the U-Net can only be added to a tensor, got a call of {name}")


def call_unet(
    unet: nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    condition: torch.Tensor,
    residuals: Sequence[Residual],
) -> torch.Tensor:
    """What the U-Net predicts, with residuals added to its skip tensors and to the output of its mid block.

    Args:
        unet: diffusers' UNet2DConditionModel.
        latents: [B, 4, h, w], in the dtype of the U-Net.
        timestep: [] or [B], on the latents' device.
        condition: [B, L, D], in the same dtype.
        residuals: one for every skip tensor, and then that of the mid block.

    Returns:
        [B, 4, h, w].
    """
    *down, mid = residuals
    return unet(
        latents,
        timestep,
        encoder_hidden_states=condition,
        down_block_additional_residuals=tuple(down),
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
