"""The functional API: checks the inputs, chooses the backend, calls it."""

import math
from collections.abc import Sequence

import torch

from . import absorbed, reference
from . import backend as backends
from .reference import Projection


def patch_mining(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection,
    key: Projection,
    value: Projection,
    *,
    grid: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """Patch info mining: every low-resolution query attends to its own window of the high-resolution pyramid.

    Args:
        queries: [B, N, D] (grid 1) or [B, V, N, D], N a square number; V = grid * grid cells row by row, or one more with the
            global view last. Floating point.
        pyramid: stage maps [B, n_s, n_s, C_s], channels last, finest first, of the queries' batch.
        query, key, value: the three projections; key and value take sum(C_s) channels.
        grid: cells per side of the low-resolution canvas.
        backend: overrides the choice in force.

    Returns:
        Mined features of the queries' shape, residual not added.

    Raises:
        ValueError: shapes that do not fit; the message names expected and actual.
        BackendError: a backend was named that cannot run here.
    """
    views = queries[:, None] if queries.dim() == 3 else queries
    _check_mining(views, pyramid, key, grid)
    implementation = {"reference": reference.patch_mining, "torch": absorbed.patch_mining}
    chosen = implementation[backends.choose("patch_mining", backend, queries.device)]
    return chosen(views, pyramid, query, key, value, grid=grid).reshape(queries.shape)


def _check_mining(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], key: Projection, grid: int) -> None:
    if queries.dim() != 4:
        raise ValueError(f"patch_mining: queries must be [B, N, D] or [B, V, N, D], got {list(queries.shape)}")
    b, views, n, _ = queries.shape
    side = math.isqrt(n)
    if side * side != n or n == 0:
        raise ValueError(f"patch_mining: the number of queries per view must be a square, got {n}")
    if views not in (grid * grid, grid * grid + 1):
        raise ValueError(
            f"patch_mining: with grid={grid} expected {grid * grid} views, or {grid * grid + 1} with the global one, got {views}"
        )
    if views > grid * grid and grid == 1:
        raise ValueError("patch_mining: a global view needs grid >= 2, got grid=1 with 2 views")
    for level, stage in enumerate(pyramid):
        if stage.dim() != 4 or stage.shape[0] != b or stage.shape[1] != stage.shape[2]:
            raise ValueError(f"patch_mining: pyramid level {level} must be [{b}, n, n, C], got {list(stage.shape)}")
    channels = sum(stage.shape[-1] for stage in pyramid)
    if channels != key.weight.shape[1]:
        raise ValueError(f"patch_mining: the pyramid has {channels} channels, the projections take {key.weight.shape[1]}")
    n0 = pyramid[0].shape[1]
    if n0 % (grid * side):
        raise ValueError(
            f"patch_mining: the finest map of {n0}x{n0} must be a multiple of the {grid * side}x{grid * side} query grid "
            f"(grid {grid}, {side}x{side} queries per view)"
        )
