"""Patch info mining: checks the inputs, chooses the backend and calls it; the kernels are operators of torch."""

import functools
import math
import operator
from collections.abc import Sequence

import torch

from ..errors import BackendError
from . import backend as backends
from . import reference
from .custom_op_support import architecture_of, copied, copied_rows, on_device, recording
from .operation import Operation, Operator, register
from .reference import CalledProjection, Projection
from .torch import patch_mining as torch_form

__all__ = [
    "MAX_WINDOW",
    "patch_mining",
    "pool_windows",
    "pool_windows_backward",
    "pool_windows_backward_pyramid",
]

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


def chosen_kernel(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, kernel: str) -> str:
    """The kernel that `kernel` stands for, "coarse" or "fine".

    It depends on dtypes, sizes and the GPU only, so the backward pass finds the kernel of the forward pass. Where no
    kernel is compiled, as on a CPU, "auto" is "fine", and "coarse" can be asked for.

    Raises:
        BackendError: it was named and does not take these tensors, or not on this GPU.
    """
    architecture = architecture_of(queries)
    if kernel == "fine" or (kernel == "auto" and architecture is None):
        return "fine"
    from ..kernels.patch_mining_coarse import why_not_coarse

    reason = why_not_coarse(queries, pyramid, grid, architecture)
    if reason and kernel == "coarse":
        raise BackendError(f"the kernel 'coarse' cannot run patch_mining: {reason}")
    return "fine" if reason else "coarse"


# The kernels as operators of torch. Each is one node of a graph, with a fake for tracing. The launchers' docstrings say
# what they launch.


@torch.library.custom_op("mg_fast::patch_mining", mutates_args=())
def pool_windows(
    queries: torch.Tensor, pyramid: list[torch.Tensor], grid: int, kernel: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.patch_mining.pool_windows_fwd`, or `kernels.patch_mining_coarse.pool_coarse_fwd`; see `chosen_kernel`.

    A gradient to the pyramid recomputes by the PyTorch form.
    """
    from ..kernels.patch_mining import pool_windows_fwd
    from ..kernels.patch_mining_coarse import pool_coarse_fwd

    coarse = chosen_kernel(queries, pyramid, grid, kernel) == "coarse"
    with on_device(queries):
        return (pool_coarse_fwd if coarse else pool_windows_fwd)(queries, pyramid, grid)


@pool_windows.register_fake
def _(queries, pyramid, grid, kernel="auto"):
    side = pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2]))
    statistics = queries.new_empty(*queries.shape[:3], 3, side * side, dtype=torch.float32)
    dtype = functools.reduce(torch.promote_types, (level.dtype for level in pyramid), queries.dtype)
    return queries.new_empty(queries.shape, dtype=dtype), statistics


@torch.library.custom_op("mg_fast::patch_mining_backward", mutates_args=())
def pool_windows_backward(
    grad: torch.Tensor,
    queries: torch.Tensor,
    pyramid: list[torch.Tensor],
    statistics: torch.Tensor,
    grid: int,
    kernel: str = "auto",
) -> torch.Tensor:
    """`kernels.patch_mining.pool_windows_bwd`, or `kernels.patch_mining_coarse.pool_coarse_bwd`.

    The statistics must be those of the same kernel.
    """
    from ..kernels.patch_mining import pool_windows_bwd
    from ..kernels.patch_mining_coarse import pool_coarse_bwd

    coarse = chosen_kernel(queries, pyramid, grid, kernel) == "coarse"
    with on_device(queries):
        return (pool_coarse_bwd if coarse else pool_windows_bwd)(grad, queries, pyramid, statistics, grid)


@pool_windows_backward.register_fake
def _(grad, queries, pyramid, statistics, grid, kernel="auto"):
    return queries.new_empty(queries.shape)


@torch.library.custom_op("mg_fast::patch_mining_backward_pyramid", mutates_args=())
def pool_windows_backward_pyramid(
    grad: torch.Tensor, queries: torch.Tensor, pyramid: list[torch.Tensor], wanted: list[bool], grid: int
) -> list[torch.Tensor]:
    """Gradients to the `wanted` levels of the pyramid, by the PyTorch form.

    This is an operator so that graphs need not trace it.
    """
    with recording(), torch.enable_grad():
        levels = [level.detach().requires_grad_(want) for level, want in zip(pyramid, wanted)]
        pooled = torch_form.pool_windows(queries.detach(), levels, grid)
        return list(
            torch.autograd.grad(pooled, [level for level in levels if level.requires_grad], grad.to(pooled.dtype))
        )


@pool_windows_backward_pyramid.register_fake
def _(grad, queries, pyramid, wanted, grid):
    return [level.new_empty(level.shape) for level, want in zip(pyramid, wanted) if want]


def _pool_windows_context(ctx, inputs, output):
    queries, pyramid, ctx.grid, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(queries, output[1], *pyramid)


def _pool_windows_gradients(ctx, grad, _):
    queries, statistics, *pyramid = ctx.saved_tensors
    grad_queries = (
        pool_windows_backward(grad, queries, pyramid, statistics, ctx.grid, ctx.kernel)
        if ctx.needs_input_grad[0]
        else None
    )
    wanted = [level.requires_grad for level in pyramid]
    gradients = iter(pool_windows_backward_pyramid(grad, queries, pyramid, wanted, ctx.grid) if any(wanted) else ())
    # A default that was not passed takes no gradient.
    rest = [None for _ in ctx.needs_input_grad[2:]]
    return grad_queries, [next(gradients) if want else None for want in wanted], *rest


torch.library.register_autograd("mg_fast::patch_mining", _pool_windows_gradients, setup_context=_pool_windows_context)


def _pooling_launches(queries: torch.Tensor, grid: int) -> int:
    """One launch for the cells, and one for the global view if there is one."""
    return 1 + (queries.shape[1] > grid * grid)


def _pool_windows_launches(queries: torch.Tensor, pyramid: list[torch.Tensor], grid: int, kernel: str = "auto") -> int:
    """The launches that pool, and before them the one over the pyramid of the kernel on coarse pixels."""
    coarse = chosen_kernel(queries, pyramid, grid, kernel) == "coarse"
    return _pooling_launches(queries, grid) + coarse


def _pool_windows_workspaces(
    queries: torch.Tensor, pyramid: list[torch.Tensor], grid: int, kernel: str = "auto"
) -> list[int]:
    """The copies, and the planes that the pass over the pyramid writes."""
    copies = copied(queries) + copied_rows(*pyramid)
    if chosen_kernel(queries, pyramid, grid, kernel) == "fine":
        return copies
    from ..kernels.patch_mining_fields import planes

    (_, geometries), *_ = launch_geometries(queries, pyramid, grid, "coarse")
    return copies + [4 * planes(g.gram) * level[..., 0].numel() for g, level in zip(geometries, pyramid)]


def launch_geometries(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, kernel: str = "fine"
) -> list[tuple[int, tuple]]:
    """For every launch of a pooling kernel, its programs and the levels' geometries.

    They are `kernels.windows.Geometry` for the kernel "fine", and `CoarseGeometry` for "coarse".
    """
    from ..kernels import patch_mining, patch_mining_coarse

    # Empty tensors replace those given, because the GPU that these name may not be present.
    queries, *pyramid = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (queries, *pyramid))
    launches = (patch_mining_coarse if kernel == "coarse" else patch_mining).launches
    return [(programs, arguments["GEOMETRIES"]) for programs, arguments in launches(queries, pyramid, grid)]


def pool_windows_flop(queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int, kernel: str = "auto") -> int:
    """Floating-point operations of the kernels for queries [B, V, N, C] and maps [B, n_s, n_s, C_s].

    Only their shapes and dtypes are read. Padding counts as none.
    """
    kernel, flop = chosen_kernel(queries, pyramid, grid, kernel), 0
    side, launches = (
        pyramid[0].shape[1] // (grid * math.isqrt(queries.shape[2])),
        launch_geometries(queries, pyramid, grid, kernel),
    )
    for programs, geometries in launches:
        for level, map in zip(geometries, pyramid):
            channels, k, pixels = map.shape[-1], level.taps, side**2
            if kernel == "coarse":
                # Scores of coarse pixels, and their weighted sum.
                flop += 2 * programs * channels * 2 * k * k
                continue
            # The three terms: making pixels by a matrix product (making them tap by tap counts as none), scores, and
            # the sum over coarse pixels or over taps.
            flop += 2 * programs * channels * (pixels * k * k + pixels + (k * k or pixels * level.span**2))
    if kernel == "coarse":
        from ..kernels.patch_mining_fields import planes

        # Each pixel's sum, and its products with its neighbours.
        flop += sum(2 * map.numel() * planes(level.gram) for level, map in zip(launches[0][1], pyramid))
    return flop


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
                launches=_pool_windows_launches,
                workspaces=_pool_windows_workspaces,
                flop=pool_windows_flop,
                # Every launch but the first reads maps that another one has read.
                reads_again=lambda queries, pyramid, grid, kernel="auto": (
                    pyramid * (_pool_windows_launches(queries, pyramid, grid, kernel) - 1)
                ),
            ),
            Operator(
                name="mg_fast::patch_mining_backward",
                launches=lambda grad, queries, pyramid, statistics, grid, kernel="auto": _pooling_launches(
                    queries, grid
                ),
                workspaces=lambda grad, queries, pyramid, statistics, grid, kernel="auto": (
                    copied(grad) + copied_rows(*pyramid)
                ),
            ),
        ),
    )
)
