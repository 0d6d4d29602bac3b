"""Linear layers by the library that is faster, and those of a ConvNeXt block: the `torch` backend of `ops.pointwise`."""

import math

import torch
import torch.nn.functional as F

# from which the convolution is faster; in float16 it has not been seen to be
_FEWEST_ROWS = {torch.float32: 512, torch.bfloat16: 1024}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, by the library that is faster: on CPUs, from some size on, oneDNN's 1x1 convolution."""
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or weight.numel() < 2**17 or rows < _FEWEST_ROWS.get(x.dtype, math.inf):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x W^T + b): the library's product with its bias, and one pass in place."""
    y = linear(x, weight, bias)
    # whose gradient needs what it would overwrite
    return F.gelu(y) if y.requires_grad else torch.ops.aten.gelu_(y)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """r + x W^T + b: the library's product with its bias, and one pass in place.

    addmm with the residual in the bias's place would copy it first, and leaves the bias to a pass of its own.
    """
    y = linear(x, weight, bias)
    return y.add_(residual) if y.dtype == torch.promote_types(y.dtype, residual.dtype) else y + residual


def linear_residual_(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The same into the residual."""
    return residual.add_(linear(x, weight, bias))
