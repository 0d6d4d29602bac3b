"""Patch info mining: checks the inputs, chooses the backend and calls it."""

import functools
import math
import operator
from collections.abc import Sequence

import torch

from . import backend as backends
from . import reference
from .custom_op_support import copied, copied_rows
from .operation import Operation, Operator, register
from .pooled_windows import (
    pool_windows,
    pool_windows_flop,
    pool_windows_launches,
    pool_windows_workspaces,
    pooling_launches,
)
from .reference import CalledProjection, Projection
from .torch import patch_mining as torch_form

__all__ = ["MAX_WINDOW", "patch_mining"]

# Side in pixels of the largest window that fits in the kernel's registers.
MAX_WINDOW = 16
# What the argument `kernel` may be.
KERNELS = ("auto", "coarse", "fine")


def patch_mining(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    value: Projection | CalledProjection,
    *,
    grid: int = 1,
    backend: str | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Patch info mining: every low-resolution query attends to its own window of the high-resolution pyramid.

    Args:
        queries: [B, N, D] (grid 1) or [B, V, N, D], floating point, N a square number. V is grid * grid cells row by
            row, or one more with the global view last.
        pyramid: stage maps [B, n_s, n_s, C_s], channels last, finest first, with the same B as the queries.
        query, key, value: the three projections; key and value take sum(C_s) channels. If one of them is a
            `CalledProjection`, every backend calls all three for each pixel, in the reference's steps, because the
            faster forms do not project pixels.
        grid: cells per side of the low-resolution canvas.
        backend: overrides the choice in force.
        kernel: which kernel the `triton` backend runs, one of KERNELS; other backends ignore it. "coarse" works on the
            maps' own pixels and is compiled for GPUs of compute capability 9.0 only, "fine" makes the pixels of every
            window. "auto" takes "coarse" for 16-bit maps on such a GPU, and "fine" elsewhere.

    Returns:
        Mined features of the queries' shape, residual not added.

    Raises:
        ValueError: shapes do not fit; the message names what was expected and what came.
        BackendError: a backend, or a kernel of the `triton` backend, was named that cannot run here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"patch_mining: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    views, pyramid = queries[:, None] if queries.dim() == 3 else queries, list(pyramid)
    grid = operator.index(grid)
    if torch.compiler.is_compiling():
        views, *pyramid = (_with_constant_sizes(tensor) for tensor in (views, *pyramid))
    # A form is chosen even if it is then replaced, so that a backend that cannot run here raises its error.
    form = backends.choose_form(PATCH_MINING, backend, queries.device, views, pyramid, query, key, value, grid)
    if any(isinstance(projection, CalledProjection) for projection in (query, key, value)):
        form = PATCH_MINING.forms["reference"]
    elif form is _mine_by_kernel:
        form = functools.partial(_mine_by_kernel, kernel=kernel)
    return form(views, pyramid, query, key, value, grid=grid).reshape(queries.shape)


def _with_constant_sizes(tensor: torch.Tensor) -> torch.Tensor:
    """Makes all sizes but the batch constants of a trace, because tables and launches are made from them.

    The price is one graph for each set of sizes.
    """
    return tensor.reshape(tensor.shape[0], *(operator.index(size) for size in tensor.shape[1:]))


def _check(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    value: Projection | CalledProjection,
    grid: int,
) -> None:
    if queries.dim() != 4:
        raise ValueError(f"patch_mining: queries must be [B, N, D] or [B, V, N, D], got {list(queries.shape)}")
    if grid < 1:
        raise ValueError(f"patch_mining: grid must be at least 1 cell a side, got {grid}")
    b, views, n, d = queries.shape
    side = math.isqrt(n)
    if side * side != n or n == 0:
        raise ValueError(f"patch_mining: the number of queries per view must be a square, got {n}")
    if views not in (grid * grid, grid * grid + 1):
        raise ValueError(
            f"patch_mining: with grid={grid} expected {grid * grid} views, or {grid * grid + 1} with the global one, "
            f"got {views}"
        )
    if views > grid * grid and grid == 1:
        raise ValueError("patch_mining: a global view needs grid >= 2, got grid=1 with 2 views")
    if not pyramid:
        raise ValueError("patch_mining: the pyramid must have at least one level, got none")
    for level, stage in enumerate(pyramid):
        if stage.dim() != 4 or stage.shape[0] != b or stage.shape[1] != stage.shape[2] or 0 in stage.shape[1:]:
            raise ValueError(f"patch_mining: pyramid level {level} must be [{b}, n, n, C], got {list(stage.shape)}")
        if stage.device != queries.device:
            raise ValueError(
                f"patch_mining: pyramid level {level} is on {stage.device}, the queries are on {queries.device}"
            )
    for tensor in (queries, *pyramid):
        if not tensor.is_floating_point():
            raise ValueError(f"patch_mining: queries and pyramid must be floating point, got {tensor.dtype}")
    if query.takes != d:
        raise ValueError(f"patch_mining: the queries are {d} wide, the query projection takes {query.takes}")
    channels = sum(stage.shape[-1] for stage in pyramid)
    for projection in (key, value):
        if projection.takes != channels:
            raise ValueError(
                f"patch_mining: the pyramid has {channels} channels, the projections take {projection.takes}"
            )
    if query.gives != key.gives or value.gives != d:
        raise ValueError(
            f"patch_mining: query and key must be projected to one width and values to the queries' {d}, "
            f"got {query.gives}, {key.gives} and {value.gives}"
        )
    n0 = pyramid[0].shape[1]
    if n0 % (grid * side):
        raise ValueError(
            f"patch_mining: the finest map of {n0}x{n0} must be a multiple of the {grid * side}x{grid * side} query "
            f"grid (grid {grid}, {side}x{side} queries per view)"
        )


def _why_not(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection | CalledProjection,
    key: Projection | CalledProjection,
    value: Projection | CalledProjection,
    grid: int,
) -> str | None:
    """Why the Triton kernel does not take these tensors; None where it does."""
    for tensor in (queries, *pyramid):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernel takes float16, bfloat16 and float32, got {tensor.dtype}"
    side = pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2]))
    if side > MAX_WINDOW:
        return f"the kernel holds windows of up to {MAX_WINDOW}x{MAX_WINDOW} pixels, these have {side}x{side}"
    return None


def _mine_by_kernel(queries, pyramid, query, key, value, *, grid: int, kernel: str = "auto") -> torch.Tensor:
    def pool(absorbed_queries: torch.Tensor, levels: Sequence[torch.Tensor], grid: int) -> torch.Tensor:
        return pool_windows(absorbed_queries, list(levels), grid, kernel)[0]

    return torch_form.patch_mining(queries, pyramid, query, key, value, grid=grid, pool=pool)


PATCH_MINING = register(
    Operation(
        name="patch_mining",
        check=_check,
        why_not=_why_not,
        forms={"reference": reference.patch_mining, "torch": torch_form.patch_mining, "triton": _mine_by_kernel},
        auto=("triton", "torch", "reference"),
        operators=(
            Operator(
                name="mg_fast::patch_mining",
                launches=pool_windows_launches,
                workspaces=pool_windows_workspaces,
                flop=pool_windows_flop,
                # Every launch but the first reads maps that another one has read.
                reads_again=lambda queries, pyramid, grid, kernel="auto": (
                    pyramid * (pool_windows_launches(queries, pyramid, grid, kernel) - 1)
                ),
            ),
            Operator(
                name="mg_fast::patch_mining_backward",
                launches=lambda grad, queries, pyramid, statistics, grid, kernel="auto": pooling_launches(
                    queries, grid
                ),
                workspaces=lambda grad, queries, pyramid, statistics, grid, kernel="auto": (
                    copied(grad) + copied_rows(*pyramid)
                ),
            ),
        ),
    )
)
