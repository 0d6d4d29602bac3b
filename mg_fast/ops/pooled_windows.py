"""Pooling the windows of patch info mining: the kernels as operators of torch, and what they launch and compute."""

import functools
import math
from collections.abc import Sequence

import torch

from ..errors import BackendError
from .custom_op_support import architecture_of, copied, copied_rows, on_device, recording
from .torch import patch_mining as torch_form

__all__ = ["pool_windows", "pool_windows_backward", "pool_windows_backward_pyramid"]


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


# Each operator is one node of a graph, with a fake for tracing. The launchers' docstrings say what they launch.


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


def pooling_launches(queries: torch.Tensor, grid: int) -> int:
    """One launch for the cells, and one for the global view if there is one."""
    return 1 + (queries.shape[1] > grid * grid)


def pool_windows_launches(queries: torch.Tensor, pyramid: list[torch.Tensor], grid: int, kernel: str = "auto") -> int:
    """The launches that pool, and before them the one over the pyramid of the kernel on coarse pixels."""
    coarse = chosen_kernel(queries, pyramid, grid, kernel) == "coarse"
    return pooling_launches(queries, grid) + coarse


def pool_windows_workspaces(
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
