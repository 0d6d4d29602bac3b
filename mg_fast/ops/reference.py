"""Every operation as the original Mini-Gemini does it: definition, oracle and baseline.

It runs the original's operations in the original's order and dtypes, with its copies, no more and no fewer, so that a
speedup over this path is a speedup over the original. It covers evaluation mode only: the original's stochastic depth
is left out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime.layer_dtypes import autocasting

LAYER_NORM_EPS = 1e-5


class Projection(NamedTuple):
    """LayerNorm and Linear of one `vlm_uni_*_projector`: gain and bias [C_in], weight [C_out, C_in], bias [C_out]."""

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def takes(self) -> int:
        """Width C_in of its input."""
        return self.weight.shape[1]

    @property
    def gives(self) -> int:
        """Width C_out of its output."""
        return self.weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, self.norm_weight.shape, self.norm_weight, self.norm_bias, LAYER_NORM_EPS)
        return F.linear(x, self.weight, self.bias)


class CalledProjection(NamedTuple):
    """A projection that computes more than its tensors say, so its module is called: x [..., takes] -> [..., gives]."""

    module: Callable[[torch.Tensor], torch.Tensor]
    takes: int
    gives: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # A module on another device or in another dtype returns its result there. Under autocast no cast is needed.
        projected = self.module(x).to(x.device)
        return projected if autocasting(x) else projected.to(x.dtype)


def low_resolution_views(pixels: torch.Tensor, side: int, *, grid: int = 1, global_view: bool = False) -> torch.Tensor:
    """The LR views of high-resolution pictures: bilinear without antialiasing, from the normalised HR tensor.

    Args:
        pixels: [B, 3, HR, HR], float32, normalised.
        side: side of one view in pixels.
        grid: tiles per side of the LR canvas.
        global_view: append the canvas shrunk to one view.

    Returns:
        [B, V, 3, side, side]; V = grid * grid tiles row by row, then the global view.
    """
    b = pixels.shape[0]
    canvas = F.interpolate(pixels, size=(side * grid, side * grid), mode="bilinear", align_corners=False)
    tiles = (
        canvas.reshape(b, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, 3, side, side)
    )
    if global_view:
        whole = F.interpolate(canvas, size=(side, side), mode="bilinear", align_corners=False)
        tiles = torch.cat([tiles, whole[:, None]], dim=1)
    return tiles.contiguous()


def dwconv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The first half of a ConvNeXt block, in timm's steps.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, 7, 7], of the depthwise convolution.
        bias, norm_weight, norm_bias: [C].
        eps: of the LayerNorm.

    Returns:
        [B, H, W, C], as the block's MLP takes it.
    """
    x = F.conv2d(x, weight, bias, padding=3, groups=x.shape[1])
    return F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps)


def merge_pyramid(stages: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stage maps [B, C_s, n_s, n_s] as one map [B, sum C_s, n_0, n_0], concatenated over channels.

    Stages 1 and up are resized in float32 (bilinear, align_corners=False) and cast back.
    """
    size = stages[0].shape[-2:]
    maps = [stages[0]]
    for stage in stages[1:]:
        resized = F.interpolate(stage.to(torch.float32), size=size, mode="bilinear", align_corners=False)
        maps.append(resized.to(stage.dtype))
    return torch.cat(maps, dim=1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The attention of each query to the pixels of its own window, in the original's steps.

    Args:
        query: [B, N, D].
        key, value: [B, N, P, D], P pixels of each query's window.

    Returns:
        [B, N, D].
    """
    scores = query[:, :, None] @ (key.transpose(-1, -2) / (key.shape[-1] ** 0.5))
    scores = scores.nan_to_num()
    return (scores.softmax(-1) @ value).mean(2)


def mine(
    queries: torch.Tensor,
    hr_map: torch.Tensor,
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    value: Projection | CalledProjection,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = attend,
) -> torch.Tensor:
    """Patch info mining of one square tile: each query attends to the window of the map under its own patch.

    Args:
        queries: [B, N, D], N a square number.
        hr_map: [B, C, S, S], S a multiple of sqrt(N).
        query, key, value: `vlm_uni_query_projector` (D -> D), `vlm_uni_aux_projector` (C -> D), `vlm_uni_val_projector`
            (C -> D).
        attend: computes the attention from the projected queries, keys and values; by default in the original's steps.

    Returns:
        Mined features [B, N, D]; the residual is not added (paper, section 3.1; `unified_resampler` in the original
        code).
    """
    patches = int(queries.shape[1] ** 0.5)
    side = hr_map.shape[-1] // patches
    windows = hr_map.permute(0, 2, 3, 1)
    windows = windows.reshape(len(windows), patches, side, patches, side, windows.shape[-1])
    windows = windows.permute(0, 1, 3, 2, 4, 5)
    windows = windows.reshape(len(windows), patches**2, side**2, windows.shape[-1]).contiguous()

    return attend(query(queries), key(windows), value(windows))


def patch_mining(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    value: Projection | CalledProjection,
    *,
    grid: int = 1,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = attend,
) -> torch.Tensor:
    """Patch info mining of every view of a picture, standard (grid 1) or HD.

    Args:
        queries: [B, V, N, D]; V = grid * grid cells row by row, then possibly the global view.
        pyramid: stage maps [B, n_s, n_s, C_s], channels last.
        query, key, value: the three projections.
        grid: cells per side.
        attend: as of `mine`.

    Returns:
        Mined features of the queries' shape; the residual is not added.
    """
    b, views, n, d = queries.shape
    cells = grid * grid
    hr_map = merge_pyramid([stage.permute(0, 3, 1, 2) for stage in pyramid]).to(queries.dtype)

    mined = []
    if views > cells:
        reduced = F.interpolate(hr_map.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False)
        mined.append(mine(queries[:, cells], reduced.to(hr_map.dtype), query, key, value, attend)[:, None])
    if grid > 1:
        channels, size = hr_map.shape[1], hr_map.shape[-1] // grid
        hr_map = hr_map.reshape(b, channels, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
        hr_map = hr_map.reshape(b * cells, channels, size, size).contiguous()
    local = mine(queries[:, :cells].reshape(b * cells, n, d), hr_map, query, key, value, attend)
    return torch.cat([local.reshape(b, cells, n, d), *mined], dim=1)


def order_tokens(features: torch.Tensor, *, grid: int) -> torch.Tensor:
    """Features [B, V, N, D] in view order as tokens [B, V * N, D]: the global view first, then the cells row by row."""
    cells = grid * grid
    ordered = torch.cat([features[:, cells:], features[:, :cells]], dim=1)
    return ordered.flatten(1, 2)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes gelu(x W^T + b), a ConvNeXt block's first pointwise layer: x [..., K], W [N, K], b [N] -> [..., N]."""
    return F.gelu(F.linear(x, weight, bias))


def linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Computes r + x W^T + b, a ConvNeXt block's second pointwise layer: layer scale is folded in, r is [..., N].

    The other tensors are those of `linear_gelu`.
    """
    return residual + F.linear(x, weight, bias)
