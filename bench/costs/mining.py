"""The cost of patch info mining: by the reference, by the PyTorch form and by the Triton kernel."""

import math
from dataclasses import dataclass

import torch

from mg_fast.ops.operation import product_flop
from mg_fast.ops.pooled_windows import launch_geometries, pool_windows_flop
from mg_fast.ops.torch.bilinear_tables import neighbours, reach

from ..cases.settings import DIMS, PATCHES, WIDTH
from ..registry import Cost
from .operators import FLOAT32, attention_flop, cast, copy, layer_norm, linear, resize

# Pixels along a side of the largest cell: a larger picture is cut into cells, as in HD.
CELL = 768


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call of patch_mining; by default the published models' at 768 pixels.

    Args:
        grid: cells along a side of the picture.
        views: of each picture; the cells, and the global view if there is one.
        side: queries along a side of a view.
        dim: channels of a query.
        levels: side in pixels and channels of the pyramid's maps, finest first.
    """

    dtype: torch.dtype
    batch: int = 1
    grid: int = 1
    views: int = 1
    side: int = PATCHES
    dim: int = WIDTH
    levels: tuple[tuple[int, int], ...] = tuple((192 >> s, c) for s, c in enumerate(DIMS))

    @classmethod
    def of_picture(cls, pixels: int, dtype: torch.dtype, batch: int = 1) -> "Sizes":
        """A picture of this many pixels along a side.

        Up to 768 pixels there is one view; a larger picture has cells of at most 768 pixels and the global view, as
        the published HD models at 1536.
        """
        grid = math.ceil(pixels / CELL)
        levels = tuple((pixels // 4 >> s, c) for s, c in enumerate(DIMS))
        return cls(dtype, batch, grid, grid**2 + (grid > 1), levels=levels)

    @property
    def channels(self) -> int:
        return sum(c for _, c in self.levels)

    @property
    def queries(self) -> int:
        return self.batch * self.views * self.side**2

    @property
    def window(self) -> int:
        """Pixels along a window's side."""
        return self.levels[0][0] // (self.grid * self.side)

    @property
    def pyramid(self) -> int:
        """Elements of the maps."""
        return self.batch * sum(n * n * c for n, c in self.levels)

    @property
    def weights(self) -> int:
        """Elements of the parameters: three projections, each a LayerNorm and a linear layer."""
        d, c = self.dim, self.channels
        return (2 * d + d * d + d) + 2 * (2 * c + c * d + d)

    @property
    def absorbed_itemsize(self) -> int:
        """Bytes of one element of the absorbed queries, which in float16 are float32, since they could overflow."""
        return FLOAT32 if self.dtype == torch.float16 else self.dtype.itemsize

    @property
    def pooled_itemsize(self) -> int:
        """Bytes of one element of the kernel's pooled windows: the wider one of its two inputs."""
        return max(self.dtype.itemsize, self.absorbed_itemsize)

    @property
    def rasters(self) -> list[tuple[int, int]]:
        """Windows along a side, and by how much the map is reduced: for the cells side by side, for the global view."""
        return [(self.grid * self.side, 1), (self.side, self.grid)][: 1 + (self.views > self.grid**2)]


def mining_floor(sizes: Sizes) -> Cost:
    """The floor: the FLOP of the PyTorch form, the cheapest one, and inputs, weights and outputs once.

    The two biases of the key are no part of it, since they cancel in the softmax.
    """
    weights = sizes.weights - sizes.channels - sizes.dim
    moved = 2 * sizes.queries * sizes.dim + sizes.pyramid + weights
    return Cost(torch_mining(sizes).flop, moved * sizes.dtype.itemsize)


def reference_mining(sizes: Sizes) -> Cost:
    """`mg_fast.ops.reference.patch_mining`."""
    b, grid, n, c, e = sizes.batch, sizes.grid, sizes.levels[0][0], sizes.channels, sizes.dtype.itemsize
    fine, reduced, cells = b * n * n, b * (n // grid) ** 2, grid * grid
    cost = Cost()
    # merge_pyramid resizes every level but the finest, in float32, and then concatenates the levels.
    for size, channels in sizes.levels[1:]:
        cost += resize(b * size * size * channels, fine * channels, e)
    cost += copy(fine * c * e)
    if sizes.views > cells:
        # For the global view the whole map is reduced in float32.
        cost += resize(fine * c, reduced * c, e) + _mine(sizes, b)
        # The queries of the cells are copied, since those of several pictures are not side by side.
        cost += copy(b * cells * sizes.side**2 * sizes.dim * e) * (b > 1)
    # The map is cut into cells.
    cost += copy(fine * c * e) * (grid > 1)
    cost += _mine(sizes, b * cells)
    # The views are put together.
    return cost + copy(sizes.queries * sizes.dim * e)


def _mine(sizes: Sizes, views: int) -> Cost:
    """`mg_fast.ops.reference.mine` for this many views."""
    d, c, e = sizes.dim, sizes.channels, sizes.dtype.itemsize
    rows = views * sizes.side**2
    pixels = rows * sizes.window**2
    # The map is cut into windows.
    cost = copy(pixels * c * e)
    # The queries are projected; keys and values of every pixel too.
    cost += layer_norm(rows, d, e) + linear(rows, d, d, e)
    cost += (layer_norm(pixels, c, e) + linear(pixels, c, d, e)) * 2
    # Keys are scaled; scores are made of queries and keys, and go through nan_to_num and softmax; values are summed.
    cost += copy(pixels * d * e) + Cost(0, (rows * d + pixels * d) * e, pixels * e) + copy(pixels * e) * 2
    cost += Cost(attention_flop(pixels, d), (pixels + pixels * d) * e, rows * d * e)
    # The mean over one query.
    return cost + copy(rows * d * e)


def torch_mining(sizes: Sizes) -> Cost:
    """`mg_fast.ops.torch.patch_mining.patch_mining` in the form for GPUs.

    Bytes leave out the tensors that hold one number per pixel instead of one per channel (means, deviations, scores,
    weights) and the tables. At the published sizes that is up to 4% of all bytes.
    """
    cost = _absorb(sizes) + cast(sizes.queries * sizes.channels, sizes.absorbed_itemsize, FLOAT32)
    for n, channels in sizes.levels:
        cost += _inner_products(sizes, n, channels)
    for windows, reduction in sizes.rasters:
        queries = sizes.batch * windows**2 * sizes.channels
        if reduction == 1 and sizes.grid > 1:
            # The queries of the cells are put into one raster, and what was pooled is cut back to cells.
            cost += copy(queries * FLOAT32) * 2
        for n, channels in sizes.levels:
            cost += _statistics(sizes, n, reduction) + _windows(sizes, n, channels, windows, reduction)
        # The levels are put together, then the rows of windows.
        cost += copy(queries * FLOAT32) * 2
    # The views are put together.
    cost += copy(sizes.queries * sizes.channels * FLOAT32) * (len(sizes.rasters) > 1)
    return cost + _project(sizes, FLOAT32)


def _inner_products(sizes: Sizes, n: int, channels: int) -> Cost:
    """One level's mean over its channels, and `ops.torch.patch_mining._inner_products`."""
    b, e = sizes.batch, sizes.dtype.itemsize
    level = b * n * n * channels
    # The mean is read from the level; then the level is made float32 and the mean is subtracted.
    cost = Cost(0, level * e) + cast(level, e, FLOAT32) + copy(level * FLOAT32)
    span = min(n, max(neighbours(sizes.levels[0][0], n, reduction) for _, reduction in sizes.rasters))
    for down, across in ((y, x) for y in range(span) for x in range(span)):
        # A pixel with itself takes one pass. Neighbours, along both diagonals, are multiplied and then summed.
        product = b * (n - down) * (n - across) * channels * FLOAT32
        both = Cost(0, product * 3, product) * (2 if down and across else 1)
        cost += both if down or across else Cost(0, product)
    return cost


def _statistics(sizes: Sizes, n: int, reduction: int) -> Cost:
    """One level's share of `ops.torch.patch_mining._statistics`: its means and inner products resized."""
    b, fine = sizes.batch, sizes.levels[0][0]
    m, span = fine // reduction, min(n, neighbours(fine, n, reduction))
    flop = product_flop(b * m, n, n + m)
    for down, across in ((y, x) for y in range(span) for x in range(span)):
        flop += product_flop(b * m, n - across, n - down + m)
    return Cost(flop)


def _windows(sizes: Sizes, n: int, channels: int, windows: int, reduction: int) -> Cost:
    """One level's share of the scores and the pooling of `ops.torch.patch_mining._pool_raster`."""
    e, m, k = sizes.dtype.itemsize, sizes.window, reach(sizes.levels[0][0], n, reduction, windows)
    count = sizes.batch * windows**2
    gathered, queries = count * k * k * channels, count * channels
    # The windows' coarse pixels are gathered, made float32, and their mean is subtracted.
    cost = copy(gathered * e) + cast(gathered, e, FLOAT32) + copy(gathered * FLOAT32)
    # Their scores are made and resized, with the sums of the queries. Weights are resized back and pixels pooled.
    resized = product_flop(count * m, k, k + m)
    cost += Cost(product_flop(gathered, 1, 1) + resized, (gathered + 2 * queries) * FLOAT32)
    cost += Cost(product_flop(gathered, 1, 1) + resized, gathered * FLOAT32, queries * FLOAT32)
    # The share of the deviations is added.
    cost += copy(queries * FLOAT32)
    if sizes.batch > 1 and reduction > 1:
        # The queries of the global view are copied, since those of several pictures are not side by side.
        cost += copy(queries * FLOAT32)
    return cost


def triton_mining(sizes: Sizes, *, cached: bool = True) -> Cost:
    """`mg_fast.ops.torch.patch_mining.patch_mining` with the Triton kernel in place of its pooling.

    Args:
        cached: count what the kernel must exchange with memory, which reads the pyramid once per launch (one launch for
            the cells, one for the global view). False counts everything that its programs ask for, most of which a
            cache serves: what windows share, and the second pass.
    """
    e, c, fine = sizes.dtype.itemsize, sizes.channels, sizes.levels[0][0]
    queries = torch.empty(sizes.batch, sizes.views, sizes.side**2, c, device="meta")
    pyramid = [torch.empty(sizes.batch, n, n, level, device="meta", dtype=sizes.dtype) for n, level in sizes.levels]
    # The kernel reads absorbed queries, and writes pooled windows and their statistics.
    written = sizes.queries * (c * sizes.pooled_itemsize + 3 * sizes.window**2 * FLOAT32)
    moved = Cost(0, sizes.queries * c * sizes.absorbed_itemsize, written)
    cost = _absorb(sizes) + Cost(pool_windows_flop(queries, pyramid, sizes.grid)) + moved
    for (windows, reduction), (_, geometries) in zip(sizes.rasters, launch_geometries(queries, pyramid, sizes.grid)):
        # Some channels of the finest level are read once more, for the means that are subtracted.
        asked = min(geometries[0].block_channels, geometries[0].channels)
        asked *= sum(_reach(fine, fine, reduction, fine // reduction)) ** 2
        for (n, channels), level in zip(sizes.levels, geometries):
            # Each of the two passes reads every level.
            spans = _reach(fine, n, reduction, windows if level.taps else fine // reduction)
            asked += 2 * channels * sum(spans) ** 2
        cost += Cost(0, (sizes.pyramid if cached else sizes.batch * asked) * e)
    return cost + _project(sizes, sizes.pooled_itemsize)


# The forms that have a formula, by the name of the backend.
MINING = {"reference": reference_mining, "torch": torch_mining, "triton": triton_mining}


def _absorb(sizes: Sizes) -> Cost:
    """`ops.torch.patch_mining._absorb`."""
    rows, d, c, e = sizes.queries, sizes.dim, sizes.channels, sizes.dtype.itemsize
    # The queries are projected, then taken to the channels of the pyramid without a bias.
    cost = layer_norm(rows, d, e) + linear(rows, d, d, e) + linear(rows, d, c, e) + Cost(0, -c * e)
    if sizes.dtype != torch.float16:
        # The key's gain is multiplied by the scale of the scores, and the projected queries by the product.
        return cost + copy(c * e) + Cost(0, (c + rows * c) * e, rows * c * e)
    # A power of two for each query: abs, amax and float, then clamp, log2, ceil and exp2.
    cost += copy(rows * d * e) + Cost(0, rows * d * e, rows * e) + cast(rows, e, FLOAT32) + copy(rows * FLOAT32) * 4
    # The queries are divided by it, which makes them float32, and are made float16 again.
    cost += Cost(0, rows * (d * e + FLOAT32), rows * d * FLOAT32) + cast(rows * d, FLOAT32, e)
    # The projected queries and the gain become float32; the power is multiplied by the scale of the scores, the gain by
    # that, and the queries by both.
    cost += cast(rows * c, e, FLOAT32) + cast(c, e, FLOAT32) + copy(rows * FLOAT32)
    return cost + Cost(0, (c + rows + 2 * rows * c) * FLOAT32, 2 * rows * c * FLOAT32)


def _project(sizes: Sizes, pooled: int) -> Cost:
    """The end of the PyTorch form: the value's gain, bias and projection, on windows of `pooled` bytes an element."""
    rows, c, e = sizes.queries, sizes.channels, sizes.dtype.itemsize
    gained = Cost(0, rows * c * pooled + 2 * c * e, rows * c * pooled)
    return gained + cast(rows * c, pooled, e) + linear(rows, c, sizes.dim, e)


def _reach(fine: int, n: int, reduction: int, windows: int) -> list[int]:
    """How many of n coarse pixels each window spans along an axis of a map that is resized to `fine`, then reduced."""
    counts, width = [], fine // windows
    for start in range(0, fine, width):
        # A reduction takes its middle pixel, or the middle two. Positions are in units of 1 / (2 * fine) coarse pixels.
        ends = (start + (reduction - 1) // 2, start + width - 1 - (reduction - 1) // 2)
        first, last = (max((2 * pixel + 1) * n - fine, 0) for pixel in ends)
        counts.append(min(-(-last // (2 * fine)), n - 1) - first // (2 * fine) + 1)
    return counts
