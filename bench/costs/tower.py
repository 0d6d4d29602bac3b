"""The cost of the high-resolution tower: by the library, by one kernel, and by all kernels."""

from dataclasses import dataclass

import torch

from mg_fast.modules.convnext_channels_last import chunks
from mg_fast.ops.torch.pointwise import EXTRA

from ..cases.settings import DEPTHS, DIMS
from ..registry import Cost
from .operators import (
    copy,
    depthwise_convolution,
    dwconv_norm,
    layer_norm,
    linear,
    linear_residual,
    patch_convolution,
)

# The backends that have a formula. `auto` on a GPU takes the kernel for convolutions and the library for products.
FORMS = ("torch", "auto", "triton")


@dataclass(frozen=True)
class Tower:
    """The sizes of one call of the tower; by default ConvNeXt-L, as published, at 768 pixels.

    Args:
        size: side of the picture in pixels.
        dims, depths: channels and blocks of the stages.
    """

    dtype: torch.dtype
    batch: int = 1
    size: int = 768
    dims: tuple[int, ...] = DIMS
    depths: tuple[int, ...] = DEPTHS

    @property
    def rows(self) -> list[int]:
        """Pixels of each stage's map, of the whole batch."""
        return [self.batch * (self.size // 4 >> s) ** 2 for s in range(len(self.dims))]

    @property
    def weights(self) -> int:
        """Elements of the parameters, layer scale folded in."""
        stem = self.dims[0] * (3 * 16 + 1 + 2)
        between = sum(2 * before + 4 * before * after + after for before, after in zip(self.dims, self.dims[1:]))
        blocks = (depth * (49 * c + 3 * c + 8 * c * c + 5 * c) for c, depth in zip(self.dims, self.depths))
        return stem + between + sum(blocks)


def tower_floor(tower: Tower) -> Cost:
    """The floor; every form has the same FLOP."""
    maps = sum(rows * c for rows, c in zip(tower.rows, tower.dims))
    moved = 3 * tower.batch * tower.size**2 + tower.weights + maps
    return Cost(tower_cost(tower, "triton").flop, moved * tower.dtype.itemsize)


def tower_cost(tower: Tower, form: str) -> Cost:
    """`mg_fast.modules.convnext_channels_last.run_tower` by one of FORMS. Stem and downsamplings are the library's."""
    e, rows, dims = tower.dtype.itemsize, tower.rows, tower.dims
    # The stem is a convolution and then a norm, a downsampling a norm and then a convolution.
    cost = patch_convolution(tower.batch * tower.size**2, 3, rows[0], dims[0], 4, e) + layer_norm(rows[0], dims[0], e)
    for s in range(1, len(dims)):
        cost += layer_norm(rows[s - 1], dims[s - 1], e)
        cost += patch_convolution(rows[s - 1], dims[s - 1], rows[s], dims[s], 2, e)
    for m, c, depth in zip(rows, dims, tower.depths):
        if form == "torch":
            convolution = depthwise_convolution(m, c, e) + layer_norm(m, c, e)
        else:
            # In 16 bits the norm is a launch of its own, which reads the sums.
            convolution = dwconv_norm(m, c, e) + Cost(0, m * c * e) * (e == 2)
        cost += (convolution + _products(m, c, e, by_kernels=form == "triton")) * depth
    return cost


def _products(rows: int, c: int, e: int, *, by_kernels: bool) -> Cost:
    """The products of a block in chunks of rows, each of which reads the weights again."""
    cost = Cost()
    # The library's products are wider in 16 bits, and the second one needs no bias.
    wide = e == 2 and not by_kernels
    hidden = 4 * c + EXTRA * wide
    for chunk in chunks(rows, hidden * e, "cuda"):
        m = len(range(*chunk.indices(rows)))
        cost += linear(m, c, hidden, e) + linear_residual(m, hidden, c, e)
        if not by_kernels:
            # The library's GELU works in place.
            cost += copy(m * hidden * e)
        if wide:
            cost += Cost(0, -c * e)
        elif not by_kernels:
            # Its sum with the map reads the product once more.
            cost += copy(m * c * e)
    return cost
