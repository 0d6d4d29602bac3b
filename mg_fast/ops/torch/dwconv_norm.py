"""The first half of a ConvNeXt block on channels-last maps: the `torch` backend of `ops.dwconv_norm`."""

import torch
import torch.nn.functional as F


def dwconv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`mg_fast.ops.dwconv_norm` in PyTorch; the convolution reads the map as a channels-last NCHW tensor."""
    kernel = weight.t().reshape(-1, 1, 7, 7)
    # An NHWC map is a channels-last NCHW one. In another layout the convolution would take its slow path.
    seen = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    convolved = F.conv2d(seen, kernel, bias, padding=3, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return F.layer_norm(convolved, norm_weight.shape, norm_weight, norm_bias, eps)
