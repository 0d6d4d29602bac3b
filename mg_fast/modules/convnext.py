"""The high-resolution tower."""

from collections.abc import Sequence

import torch
from torch import nn

from .. import backend as backends


class ConvNeXtPyramid(nn.Module):
    """The high-resolution tower: a ConvNeXt trunk that returns its four stage maps.

    state_dict keys as in published checkpoints: `vision_stem.*`, `vision_stages.*`.
    """

    def __init__(self, stem: nn.Module, stages: nn.Module):
        super().__init__()
        self.vision_stem = stem
        self.vision_stages = stages

    @classmethod
    def from_timm(cls, trunk: nn.Module) -> "ConvNeXtPyramid":
        """Takes stem and stages of a timm ConvNeXt; its head, if any, is left behind.

        Raises:
            ValueError: the trunk is not a timm ConvNeXt (first version), or has an active stochastic depth.
        """
        from timm.models.convnext import ConvNeXt

        if not isinstance(trunk, ConvNeXt):
            raise ValueError(f"ConvNeXtPyramid: expected a timm ConvNeXt, got {type(trunk).__name__}")
        names = {type(m).__name__ for m in trunk.stages.modules()}
        if "GlobalResponseNorm" in names:
            raise ValueError("ConvNeXtPyramid: expected a ConvNeXt of the first version, got one with GlobalResponseNorm (V2)")
        if "DropPath" in names:
            raise ValueError("ConvNeXtPyramid: build the trunk with drop_path_rate=0: the tower is deterministic by definition")
        return cls(trunk.stem, trunk.stages)

    @classmethod
    def from_dims(cls, dims: Sequence[int], depths: Sequence[int], norm_eps: float = 1e-6) -> "ConvNeXtPyramid":
        """A tower of these stage widths and depths, with timm's own initialisation."""
        from timm.models.convnext import ConvNeXt

        return cls.from_timm(
            ConvNeXt(dims=tuple(dims), depths=tuple(depths), norm_eps=norm_eps, num_classes=0, global_pool="", drop_path_rate=0.0)
        )

    def forward(self, pixels: torch.Tensor, *, backend: str | None = None) -> list[torch.Tensor]:
        """Pictures [B, 3, HR, HR] to stage maps [B, HR / 4 / 2**s, HR / 4 / 2**s, C_s], channels last, s = 0..3."""
        backends.choose("high_resolution_tower", backend, pixels.device)
        x = self.vision_stem(pixels.to(self.vision_stem[0].weight.dtype))
        pyramid = []
        for stage in self.vision_stages:
            x = stage(x)
            # timm computes in NCHW as the original does; this is a view
            pyramid.append(x.permute(0, 2, 3, 1))
        return pyramid
