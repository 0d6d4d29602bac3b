"""A ConvNeXt block's first half on channels-last maps: the `torch` backend of `ops.dwconv_norm`."""

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
    """The map as it is, seen as a channels-last NCHW tensor by the convolution."""
    kernel = weight.t().reshape(-1, 1, 7, 7)
    # an NHWC map is a channels-last NCHW one; other layouts would take the convolution the slow way
    seen = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    convolved = F.conv2d(seen, kernel, bias, padding=3, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return F.layer_norm(convolved, norm_weight.shape, norm_weight, norm_bias, eps)
