"""FLOP and bytes by sizes: of patch info mining by the reference, the PyTorch form and the Triton kernel, and of the
high-resolution tower by the PyTorch form and the kernels.

    python -m bench.accounting

FLOP are those of torch's FlopCounterMode: 2 for a multiply-add, products of matrices and convolutions only. The rest
(LayerNorm, softmax, resizing, elementwise work, gathers) counts as bytes. Bytes are those of operators run one by one
without a cache: each reads its inputs once, a gather what it gathers, and writes its outputs once; views are free. All
of the forward pass, without autograd, on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mg_fast.modules import convnext_channels_last as convnext
from mg_fast.ops.patch_mining import launch_geometries, pool_windows_flop

from .registry import Cost

FLOAT32 = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call of patch_mining; by default the published models at 768 pixels.

    Args:
        grid: cells along a side of the picture.
        views: per picture; one more than cells with the global view.
        side: queries along a side of a view.
        dim: channels of a query.
        levels: side in pixels and channels of the pyramid's maps, finest first.
    """

    dtype: torch.dtype
    batch: int = 1
    grid: int = 1
    views: int = 1
    side: int = 24
    dim: int = 1024
    levels: tuple[tuple[int, int], ...] = ((192, 192), (96, 384), (48, 768), (24, 1536))

    @classmethod
    def standard(cls, dtype: torch.dtype, batch: int = 1) -> "Sizes":
        return cls(dtype, batch)

    @classmethod
    def hd(cls, dtype: torch.dtype, batch: int = 1) -> "Sizes":
        """The published HD models: 1536 pixels, two by two cells and the global view."""
        return cls(dtype, batch, grid=2, views=5, levels=((384, 192), (192, 384), (96, 768), (48, 1536)))

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
    def absorbed_itemsize(self) -> int:
        """Bytes of an element of the absorbed queries: float32 for float16, which could overflow."""
        return FLOAT32 if self.dtype == torch.float16 else self.dtype.itemsize

    @property
    def rasters(self) -> list[tuple[int, int]]:
        """Windows along a side and reduction of the map: of the cells side by side, and of the global view."""
        return [(self.grid * self.side, 1), (self.side, self.grid)][: 1 + (self.views > self.grid**2)]


def floor_bytes(sizes: Sizes) -> int:
    """Inputs, weights and outputs once. The key's biases are no part of it: they cancel in the softmax."""
    d, c = sizes.dim, sizes.channels
    weights = (2 * d + d * d + d) + (c + c * d) + (2 * c + c * d + d)
    return (2 * sizes.queries * d + sizes.pyramid + weights) * sizes.dtype.itemsize


def reference_mining(sizes: Sizes) -> Cost:
    """`mg_fast.ops.reference.patch_mining`."""
    b, grid, n, c, e = sizes.batch, sizes.grid, sizes.levels[0][0], sizes.channels, sizes.dtype.itemsize
    fine, reduced, cells = b * n * n, b * (n // grid) ** 2, grid * grid
    cost = Cost()
    # merge_pyramid: each level but the finest to float32, resized, and back
    for size, channels in sizes.levels[1:]:
        cost += _resize(b * size * size * channels, fine * channels, e)
    # merge_pyramid: the concatenation
    cost += _copy(fine * c * e)
    if sizes.views > cells:
        # the global view: the whole map to float32, reduced, and back
        cost += _resize(fine * c, reduced * c, e) + _mine(sizes, b)
        # the cells' queries: no longer side by side
        cost += _copy(b * cells * sizes.side**2 * sizes.dim * e) * (b > 1)
    # the map cut into cells
    cost += _copy(fine * c * e) * (grid > 1)
    cost += _mine(sizes, b * cells)
    # the views together
    return cost + _copy(sizes.queries * sizes.dim * e)


def _mine(sizes: Sizes, views: int) -> Cost:
    """`mg_fast.ops.reference.mine` of so many views."""
    d, c, e = sizes.dim, sizes.channels, sizes.dtype.itemsize
    rows = views * sizes.side**2
    pixels = rows * sizes.window**2
    # the map cut into windows
    cost = _copy(pixels * c * e)
    # queries; keys and values of every pixel
    cost += _norm(rows, d, e) + _linear(rows, d, d, e)
    cost += (_norm(pixels, c, e) + _linear(pixels, c, d, e)) * 2
    # keys scaled; scores, of queries and keys
    cost += _copy(pixels * d * e) + Cost(2 * pixels * d, (rows * d + pixels * d) * e, pixels * e)
    # nan_to_num, softmax; the weighted sum of the values
    cost += _copy(pixels * e) * 2 + Cost(2 * pixels * d, (pixels + pixels * d) * e, rows * d * e)
    # the mean over one query
    return cost + _copy(rows * d * e)


def torch_mining(sizes: Sizes) -> Cost:
    """`mg_fast.ops.torch.patch_mining.patch_mining` in the form for GPUs.

    Bytes leave out what holds one number to a pixel, not one to a channel: means, deviations, scores, weights, and the
    tables. At the published sizes that is up to 4% of all.
    """
    cost = _absorb(sizes) + _cast(sizes.queries * sizes.channels, sizes.absorbed_itemsize, FLOAT32)
    for n, channels in sizes.levels:
        cost += _inner_products(sizes, n, channels)
    for windows, reduction in sizes.rasters:
        queries = sizes.batch * windows**2 * sizes.channels
        if reduction == 1 and sizes.grid > 1:
            # the cells' queries to one raster; what was pooled back to cells
            cost += _copy(queries * FLOAT32) * 2
        for n, channels in sizes.levels:
            cost += _statistics(sizes, n, reduction) + _windows(sizes, n, channels, windows, reduction)
        # the levels together, then the rows of windows
        cost += _copy(queries * FLOAT32) * 2
    # the views together
    cost += _copy(sizes.queries * sizes.channels * FLOAT32) * (len(sizes.rasters) > 1)
    return cost + _project(sizes, FLOAT32)


def _inner_products(sizes: Sizes, n: int, channels: int) -> Cost:
    """One level's mean over its channels, and `ops.torch.patch_mining._inner_products`."""
    b, e = sizes.batch, sizes.dtype.itemsize
    level = b * n * n * channels
    # the mean; the level in float32, less it
    cost = Cost(0, level * e) + _cast(level, e, FLOAT32) + _copy(level * FLOAT32)
    span = min(n, max(_span(sizes, n, reduction) for _, reduction in sizes.rasters))
    for down, across in ((y, x) for y in range(span) for x in range(span)):
        # of a pixel with itself: one pass; of neighbours, along both diagonals: multiplied, then summed
        product = b * (n - down) * (n - across) * channels * FLOAT32
        cost += Cost(0, product * 3, product) * (2 if down and across else 1) if down or across else Cost(0, product)
    return cost


def _span(sizes: Sizes, n: int, reduction: int) -> int:
    fine = sizes.levels[0][0]
    return max(_reach(fine, n, reduction, fine // reduction))


def _statistics(sizes: Sizes, n: int, reduction: int) -> Cost:
    """One level's share of `ops.torch.patch_mining._statistics`: its means and inner products resized."""
    b, m = sizes.batch, sizes.levels[0][0] // reduction
    cost, span = Cost(2 * b * m * n * (n + m)), min(n, _span(sizes, n, reduction))
    for down, across in ((y, x) for y in range(span) for x in range(span)):
        cost += Cost(2 * b * m * (n - across) * (n - down + m))
    return cost


def _windows(sizes: Sizes, n: int, channels: int, windows: int, reduction: int) -> Cost:
    """One level's share of the scores and the pooling of `ops.torch.patch_mining._pool_raster`."""
    e, m, k = sizes.dtype.itemsize, sizes.window, max(_reach(sizes.levels[0][0], n, reduction, windows))
    count = sizes.batch * windows**2
    gathered, queries = count * k * k * channels, count * channels
    # the windows' coarse pixels gathered, in float32, less their mean
    cost = _copy(gathered * e) + _cast(gathered, e, FLOAT32) + _copy(gathered * FLOAT32)
    # their scores, resized; the queries' sums
    cost += Cost(2 * gathered + 2 * count * m * k * (k + m), (gathered + 2 * queries) * FLOAT32)
    if sizes.batch > 1 and reduction > 1:
        # the global view's queries: not side by side
        cost += _copy(queries * FLOAT32)
    # weights resized back, pixels pooled, and the deviations' share on top
    return (
        cost
        + Cost(2 * gathered + 2 * count * m * k * (m + k), gathered * FLOAT32, queries * FLOAT32)
        + _copy(queries * FLOAT32)
    )


def triton_mining(sizes: Sizes, *, cached: bool = True) -> Cost:
    """`mg_fast.ops.torch.patch_mining.patch_mining` with the Triton kernel in the place of its pooling.

    Args:
        cached: count what the kernel must exchange with memory, the pyramid once per launch (one for the cells, one for
            the global view); else all that its programs ask for, most of which a cache serves: what windows share, and
            the second pass.
    """
    e, c, fine, pixels = sizes.dtype.itemsize, sizes.channels, sizes.levels[0][0], sizes.window**2
    # in the widest dtype of what goes in
    pooled = max(e, sizes.absorbed_itemsize)
    queries = torch.empty(sizes.batch, sizes.views, sizes.side**2, c, device="meta")
    pyramid = [
        torch.empty(sizes.batch, n, n, channels, device="meta", dtype=sizes.dtype) for n, channels in sizes.levels
    ]
    # absorbed queries in; pooled windows and statistics out
    moved = Cost(0, sizes.queries * c * sizes.absorbed_itemsize, sizes.queries * (c * pooled + 3 * pixels * FLOAT32))
    cost = _absorb(sizes) + Cost(pool_windows_flop(queries, pyramid, sizes.grid)) + moved
    for (windows, reduction), (_, geometries) in zip(sizes.rasters, launch_geometries(queries, pyramid, sizes.grid)):
        # some channels of the finest level, for the means that are taken off
        asked = sizes.batch * min(geometries[0].block_channels, geometries[0].channels)
        asked *= sum(_reach(fine, fine, reduction, fine // reduction)) ** 2
        for (n, channels), level in zip(sizes.levels, geometries):
            # in both passes
            asked += (
                2
                * sizes.batch
                * channels
                * sum(_reach(fine, n, reduction, windows if level.taps else fine // reduction)) ** 2
            )
        cost += Cost(0, (sizes.pyramid if cached else asked) * e)
    return cost + _project(sizes, pooled)


def _absorb(sizes: Sizes) -> Cost:
    """`ops.torch.patch_mining._absorb`."""
    rows, d, c, e = sizes.queries, sizes.dim, sizes.channels, sizes.dtype.itemsize
    # the queries projected, then to the pyramid's channels
    cost = _norm(rows, d, e) + _linear(rows, d, d, e) + _linear(rows, d, c, e) + Cost(0, -c * e)
    if sizes.dtype != torch.float16:
        # the key's gain times the scale of the scores; the projected queries times that
        return cost + _copy(c * e) + Cost(0, (c + rows * c) * e, rows * c * e)
    # a power of two per query: abs, amax, float, then clamp, log2, ceil and exp2
    cost += _copy(rows * d * e) + Cost(0, rows * d * e, rows * e) + _cast(rows, e, FLOAT32) + _copy(rows * FLOAT32) * 4
    # the queries over it, which makes them float32, and half again
    cost += Cost(0, rows * (d * e + FLOAT32), rows * d * FLOAT32) + _cast(rows * d, FLOAT32, e)
    # the projected ones and the gain in float32; the power times the scale of the scores; the gain times that; all
    # together
    cost += _cast(rows * c, e, FLOAT32) + _cast(c, e, FLOAT32) + _copy(rows * FLOAT32)
    return cost + Cost(0, (c + rows + 2 * rows * c) * FLOAT32, 2 * rows * c * FLOAT32)


def _project(sizes: Sizes, pooled: int) -> Cost:
    """The end of the PyTorch form: the value's gain and bias on pooled windows of so many bytes an element, and its
    projection.
    """
    rows, c, e = sizes.queries, sizes.channels, sizes.dtype.itemsize
    gained = Cost(0, rows * c * pooled + 2 * c * e, rows * c * pooled)
    return gained + _cast(rows * c, pooled, e) + _linear(rows, c, sizes.dim, e)


@dataclass(frozen=True)
class Tower:
    """Sizes of one call of the high-resolution tower; by default ConvNeXt-L, as published, at 768 pixels.

    Args:
        size: side of the picture in pixels.
        dims, depths: of the stages.
    """

    dtype: torch.dtype
    batch: int = 1
    size: int = 768
    dims: tuple[int, ...] = (192, 384, 768, 1536)
    depths: tuple[int, ...] = (3, 3, 27, 3)

    @classmethod
    def standard(cls, dtype: torch.dtype, batch: int = 1) -> "Tower":
        return cls(dtype, batch)

    @classmethod
    def hd(cls, dtype: torch.dtype, batch: int = 1) -> "Tower":
        """The published HD models' pictures."""
        return cls(dtype, batch, 1536)

    @property
    def rows(self) -> list[int]:
        """Pixels of the stages' maps, of the whole batch."""
        return [self.batch * (self.size // 4 >> s) ** 2 for s in range(len(self.dims))]

    @property
    def weights(self) -> int:
        """Elements of the parameters, layer scale folded in."""
        stem = self.dims[0] * (3 * 16 + 1 + 2)
        between = sum(2 * before + 4 * before * after + after for before, after in zip(self.dims, self.dims[1:]))
        return (
            stem
            + between
            + sum(depth * (49 * c + 3 * c + 8 * c * c + 5 * c) for c, depth in zip(self.dims, self.depths))
        )


def tower_floor_bytes(tower: Tower) -> int:
    """The picture, the weights and the stage maps once."""
    maps = sum(rows * c for rows, c in zip(tower.rows, tower.dims))
    return (3 * tower.batch * tower.size**2 + tower.weights + maps) * tower.dtype.itemsize


def torch_tower(tower: Tower) -> Cost:
    """`mg_fast.modules.convnext_channels_last.run_tower` by the library on a GPU."""
    return _tower(tower, _library_convolution, _library_products)


def auto_tower(tower: Tower) -> Cost:
    """The same with the kernel for convolutions and norms, as `auto` runs it on a GPU."""
    return _tower(tower, _kernel_convolution, _library_products)


def triton_tower(tower: Tower) -> Cost:
    """The same by kernels, but for the stem and the downsamplings."""
    return _tower(tower, _kernel_convolution, _kernel_products)


def _tower(
    tower: Tower, convolution: Callable[[int, int, int], Cost], products: Callable[[int, int, int], Cost]
) -> Cost:
    e, rows, dims = tower.dtype.itemsize, tower.rows, tower.dims
    # the stem: a convolution, then a norm; downsamplings: a norm, then a convolution
    cost = _merge(tower.batch * tower.size**2, 3, rows[0], dims[0], 4, e) + _norm(rows[0], dims[0], e)
    for s in range(1, len(dims)):
        cost += _norm(rows[s - 1], dims[s - 1], e) + _merge(rows[s - 1], dims[s - 1], rows[s], dims[s], 2, e)
    for m, c, depth in zip(rows, dims, tower.depths):
        cost += (convolution(m, c, e) + _chunked(products, m, c, e)) * depth
    return cost


def _chunked(products: Callable[[int, int, int], Cost], rows: int, c: int, e: int) -> Cost:
    """A block's products, its rows in chunks, each of which reads the weights again."""
    chunks = (len(range(*chunk.indices(rows))) for chunk in convnext.chunks(rows, 4 * c * e, "cuda"))
    return sum((products(chunk, c, e) for chunk in chunks), Cost())


def _library_convolution(rows: int, c: int, e: int) -> Cost:
    """A 7x7 depthwise convolution, then a norm."""
    return Cost(2 * 49 * rows * c, (rows + 49 + 1) * c * e, rows * c * e) + _norm(rows, c, e)


def _kernel_convolution(rows: int, c: int, e: int) -> Cost:
    """`dwconv_norm`."""
    return Cost(2 * 49 * rows * c, (rows + 49 + 3) * c * e, rows * c * e)


def _library_products(rows: int, c: int, e: int) -> Cost:
    """Expansion, GELU in place, contraction, and its sum with the map."""
    return _kernel_products(rows, c, e) + _copy(rows * 4 * c * e) + _copy(rows * c * e)


def _kernel_products(rows: int, c: int, e: int) -> Cost:
    """`linear_gelu` and `linear_residual_`, which reads the map too."""
    return _linear(rows, c, 4 * c, e) + _linear(rows, 4 * c, c, e) + Cost(0, rows * c * e)


def _merge(rows: int, channels: int, merged: int, out: int, stride: int, e: int) -> Cost:
    """A convolution of stride x stride pixels that do not overlap."""
    weight = stride**2 * channels * out
    return Cost(2 * merged * weight, (rows * channels + weight + out) * e, merged * out * e)


def _copy(size: int) -> Cost:
    """What reads so many bytes and writes as many."""
    return Cost(0, size, size)


def _cast(elements: int, before: int, after: int) -> Cost:
    """A change of dtype, from and to so many bytes an element; free where there is none to make."""
    return Cost(0, elements * before, elements * after) * (before != after)


def _resize(before: int, after: int, e: int) -> Cost:
    """Resizing in float32 from and to so many elements."""
    return _cast(before, e, FLOAT32) + Cost(0, before * FLOAT32, after * FLOAT32) + _cast(after, FLOAT32, e)


def _norm(rows: int, width: int, e: int) -> Cost:
    """LayerNorm with gain and bias; a mean and a deviation per row are written in float32."""
    return Cost(0, (rows * width + 2 * width) * e, rows * (width * e + 2 * FLOAT32))


def _linear(rows: int, width: int, out: int, e: int) -> Cost:
    return Cost(2 * rows * width * out, (rows * width + width * out + out) * e, rows * out * e)


def _reach(fine: int, n: int, reduction: int, windows: int) -> list[int]:
    """How many of n coarse pixels each window (or pixel) spans along an axis of the map that is resized to `fine` and
    then reduced.
    """
    counts, width = [], fine // windows
    for start in range(0, fine, width):
        # of a reduction the middle pixel counts, or the middle two; positions in units of 1 / (2 * fine) coarse pixels
        ends = (start + (reduction - 1) // 2, start + width - 1 - (reduction - 1) // 2)
        first, last = (max((2 * pixel + 1) * n - fine, 0) for pixel in ends)
        counts.append(min(-(-last // (2 * fine)), n - 1) - first // (2 * fine) + 1)
    return counts


def main() -> None:
    print(f"{'setting':20}{'form':24}{'GFLOP':>8}{'MB':>9}{'MB / floor':>12}")
    for name, make in {"768": Sizes.standard, "1536 HD": Sizes.hd}.items():
        for dtype in (torch.bfloat16, torch.float32):
            sizes = make(dtype)
            costs = {"reference": reference_mining(sizes), "torch": torch_mining(sizes), "triton": triton_mining(sizes)}
            costs |= {"triton, without cache": triton_mining(sizes, cached=False)}
            _print_costs(f"{name} {str(dtype).removeprefix('torch.')}", costs, floor_bytes(sizes))
    for name, make in {"768": Tower.standard, "1536": Tower.hd}.items():
        for dtype in (torch.bfloat16, torch.float32):
            tower = make(dtype)
            costs = {"torch": torch_tower(tower), "auto": auto_tower(tower), "triton": triton_tower(tower)}
            _print_costs(f"tower {name} {str(dtype).removeprefix('torch.')}", costs, tower_floor_bytes(tower))


def _print_costs(setting: str, costs: dict[str, Cost], floor: int) -> None:
    for form, cost in (costs | {"floor": Cost(0, floor)}).items():
        flop = f"{cost.flop / 1e9:.1f}" if cost.flop else "-"
        print(f"{setting:20}{form:24}{flop:>8}{cost.bytes / 1e6:>9.1f}{cost.bytes / floor:>12.1f}")


if __name__ == "__main__":
    main()
