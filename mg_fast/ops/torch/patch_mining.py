"""Patch info mining by another algebra: the `torch` backend, and the algebra around the Triton kernels.

The algebra is exact, not an approximation. With one query to a window, the key and value projections need not be
applied to pixels:

- Scores: q . (W_k (g x̂ + b) + c) = (g * W_k^T q) . x̂ + constant, and a constant cancels in the softmax. So the QUERY
  is projected to the pyramid's channels, once, instead of every pixel to the queries' width.
- Values: the weights sum to 1, so the normalised pixels are pooled first and projected once.
- Resizing is linear: a window needs only the scores of the coarse pixels under it, which are resized as scalars by a
  small matrix of bilinear weights. The softmax's weights go back through the same matrix. So no upsampled, reduced or
  concatenated map exists.
- LayerNorm's mean is linear too, and its variance is a quadratic form of the inner products of neighbouring coarse
  pixels.

For a picture of 768 pixels this reduces the products from 435 to 8 GFLOP, by count. Windows share their borders, so
coarse pixels are read more than once. For few queries of few channels there is little to save, and the plain form is
faster; both take milliseconds. A value that is not finite makes the results of its whole picture not finite. Under
torch.compile sizes must be static (dynamic=False), because the tables are made from them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..reference import LAYER_NORM_EPS, Projection
from .bilinear_tables import neighbours, resize_matrix, strip_tables, window_tables
from .pointwise import linear

# On a CPU: rows of a map whose inner products are computed together, so that they stay in the cache.
ROWS = 8
# On a CPU: bytes of the pyramids, in the accumulator's dtype, that are processed together. Their gathered windows take
# two to four times as much. A larger pyramid is processed one row of windows at a time.
TOGETHER = 8 * 2**20


def patch_mining(
    queries: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    query: Projection,
    key: Projection,
    value: Projection,
    *,
    grid: int = 1,
    pool: Callable[[torch.Tensor, Sequence[torch.Tensor], int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`reference.patch_mining` with the same arguments and result; `pool` replaces `pool_windows`."""
    pool = pool or pool_windows
    absorbed = _absorb(queries, query, key)
    pooled = pool(absorbed, pyramid, grid)
    if torch.is_grad_enabled():
        # The key's biases get a gradient of zero, not None: optimisers and data-parallel wrappers expect a gradient.
        pooled = pooled + (0.0 * key.norm_bias).sum() + (0.0 * key.bias).sum()
    pooled = torch.addcmul(value.norm_bias, pooled, value.norm_weight)
    # `linear` could choose a convolution, whose float32 sums over so many channels have three times the rounding error.
    return F.linear(pooled.to(queries.dtype), value.weight, value.bias)


def _absorb(queries: torch.Tensor, query: Projection, key: Projection) -> torch.Tensor:
    """The queries projected to the pyramid's channels, with the key's LayerNorm gains and the scale of the scores."""
    d = key.weight.shape[0]
    projected = F.layer_norm(queries, query.norm_weight.shape, query.norm_weight, query.norm_bias, LAYER_NORM_EPS)
    projected = linear(projected, query.weight, query.bias)
    # The dtype of the projected queries decides: under autocast the dtype of the queries does not determine it.
    if projected.dtype != torch.float16:
        return linear(projected, key.weight.t()) * (key.norm_weight * d**-0.5)
    # In float16 this product could overflow. Dividing by a power of two per query, which is exact, keeps it small.
    scale = projected.abs().amax(-1, keepdim=True).float().clamp(min=2.0**-14).log2().ceil().exp2()
    return linear((projected / scale).half(), key.weight.t()).float() * (key.norm_weight.float() * (scale * d**-0.5))


def pool_windows(absorbed: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int) -> torch.Tensor:
    """The softmax-weighted mean of the normalised pixels of every query's window.

    Args:
        absorbed: [B, V, N, C], queries projected to C = sum(C_s) channels; V = grid * grid cells row by row, then
            possibly the global view.
        pyramid: [B, n_s, n_s, C_s], finest first.
        grid: cells per side.

    Returns:
        [B, V, N, C] in float32 (float64 for a pyramid of float64), the accumulator's dtype.
    """
    device = absorbed.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        # Autocast would round the products of the statistics, in float16 to infinity.
        with torch.autocast(device, enabled=False):
            return pool_windows(absorbed, pyramid, grid)
    b, views, n, channels = absorbed.shape
    cells, side = grid * grid, int(n**0.5)
    dtype = torch.float64 if pyramid[0].dtype == torch.float64 else torch.float32
    in_steps = False
    # On a CPU the work should stay in the cache, but not by taking only a few windows at a time. A GPU should be kept
    # busy, and a compiler's graph small.
    if device == "cpu" and not torch.compiler.is_compiling():
        together = TOGETHER // sum(dtype.itemsize * level.shape[1:].numel() for level in pyramid)
        if b > max(1, together):
            some = max(1, together)
            parts = zip(absorbed.split(some), zip(*(level.split(some) for level in pyramid)))
            return torch.cat([pool_windows(queries, levels, grid) for queries, levels in parts])
        in_steps = together == 0
    absorbed = absorbed.to(dtype)
    centres = [level.mean(-1, dtype=dtype) for level in pyramid]
    # Inner products are computed once for cells and global view, because this reads every level several times.
    fine, reductions = pyramid[0].shape[1], (1, grid) if views > cells else (1,)
    spans = [max(neighbours(fine, level.shape[1], reduction) for reduction in reductions) for level in pyramid]
    products = [_inner_products(*level, in_steps=in_steps) for level in zip(pyramid, centres, spans)]
    # The cells lie side by side on one raster, so that a window at a cut sees pixels of the neighbouring cell, as it
    # does in the upsampled map.
    raster = (
        absorbed[:, :cells]
        .reshape(b, grid, grid, side, side, channels)
        .transpose(2, 3)
        .reshape(b, grid * side, grid * side, channels)
    )
    pooled = _pool_raster(raster, pyramid, centres, products, 1, in_steps=in_steps)
    pooled = pooled.reshape(b, grid, side, grid, side, channels).transpose(2, 3).reshape(b, cells, n, channels)
    if views > cells:
        raster = absorbed[:, cells].reshape(b, side, side, channels)
        whole = _pool_raster(raster, pyramid, centres, products, grid, in_steps=in_steps)
        pooled = torch.cat([pooled, whole.reshape(b, 1, n, channels)], dim=1)
    return pooled


def _pool_raster(
    absorbed: torch.Tensor,
    pyramid: Sequence[torch.Tensor],
    centres: Sequence[torch.Tensor],
    products: Sequence[dict[tuple[int, int], torch.Tensor]],
    reduction: int,
    *,
    in_steps: bool,
) -> torch.Tensor:
    """Pools the G x G windows of the map that is upsampled to the finest level and reduced: queries -> [B, G, G, C].

    Args:
        absorbed: queries [B, G, G, C] in the dtype of the accumulator, of `centres` and of `products`.
        pyramid: [B, n_s, n_s, C_s].
        centres: means of the levels' pixels over their channels, [B, n_s, n_s].
        products: `_inner_products` of the levels.
        reduction: 1, or the grid for the global view.
        in_steps: process one row of windows at a time.
    """
    b, g = absorbed.shape[:2]
    fine, widths = pyramid[0].shape[1], [level.shape[-1] for level in pyramid]
    side = fine // reduction // g
    # The statistics of every window's pixels: [B, row of windows, window, pixel row, pixel column].
    deviations, inverse = _statistics(widths, centres, products, reduction)
    *deviations, inverse = (t.reshape(b, g, side, g, side).transpose(2, 3) for t in (*deviations, inverse))
    parts = absorbed.split(widths, dim=-1)
    readers = [_reader(level, centre, fine, reduction, g, in_steps=in_steps) for level, centre in zip(pyramid, centres)]
    at_once = 1 if in_steps else g

    rows = []
    for top in range(0, g, at_once):
        r = slice(top, top + at_once)
        scores, windows = 0, []
        for (read, resize), queries, deviation in zip(readers, parts, deviations):
            x, k = read(r), resize.shape[-1]
            coarse = torch.matmul(queries[:, r, :, None], x.mT).squeeze(3).unflatten(-1, (k, k)).mT
            scores = scores + torch.matmul(resize[r, None], torch.matmul(coarse, resize.mT))
            scores = scores + queries[:, r].sum(-1)[..., None, None] * deviation[:, r]
            windows.append(x)
        scores = scores * inverse[:, r]
        weights = scores.flatten(3).softmax(-1).view_as(scores) * inverse[:, r]
        pooled = []
        for x, (_, resize), deviation in zip(windows, readers, deviations):
            coarse = torch.matmul(resize[r, None].mT, torch.matmul(weights, resize)).mT
            level = torch.matmul(coarse.flatten(3)[:, :, :, None], x).squeeze(3)
            pooled.append(level + (weights * deviation[:, r]).sum((3, 4))[..., None])
        rows.append(torch.cat(pooled, dim=-1))
    return torch.cat(rows, dim=1)


def _reader(
    level: torch.Tensor, centre: torch.Tensor, fine: int, reduction: int, g: int, *, in_steps: bool
) -> tuple[Callable, torch.Tensor]:
    """A function that reads rows of windows, and the weights [G, M, K] that make window pixels from coarse ones.

    The function turns a slice of rows into coarse pixels [B, rows, G, K * K, C], column by column. Each pixel is less
    its own mean over the level's channels, so that nothing cancels where features have a large common offset.
    """
    b, n, _, channels = level.shape
    sizes = (fine, n, reduction, g, centre.device, centre.dtype)
    # Gradients need every window unchanged, and the strip below is overwritten by every row.
    if not in_steps or torch.is_grad_enabled() or b != 1 or fine // g * n % fine:
        index, resize = window_tables(*sizes)
        pixels, means, k = level.flatten(1, 2), centre.flatten(1), resize.shape[-1]

        def gather(rows: slice) -> torch.Tensor:
            wanted = index[rows].flatten()
            x = pixels.index_select(1, wanted).to(means.dtype).sub_(means.index_select(1, wanted)[..., None])
            return x.unflatten(1, (-1, g, k * k))

        return gather, resize

    # On a CPU one strip of the level, column by column, is faster: the overlapping windows of a row are views of it.
    first, step, resize = strip_tables(*sizes)
    k = resize.shape[-1]
    strip = centre.new_zeros((g - 1) * step + k, k, channels)
    windows = strip.as_strided((1, 1, g, k * k, channels), (0, 0, step * k * channels, channels, 1))
    # Positions outside the map have no weight.
    across = slice(max(first, 0), min(first + len(strip), n))

    def cut(rows: slice) -> torch.Tensor:
        top = first + rows.start * step
        down = slice(max(top, 0), min(top + k, n))
        within = strip[across.start - first : across.stop - first, down.start - top : down.stop - top]
        torch.sub(level[0, down, across].transpose(0, 1), centre[0, down, across].T[..., None], out=within)
        return windows

    return cut, resize


def _statistics(
    widths: Sequence[int],
    centres: Sequence[torch.Tensor],
    products: Sequence[dict[tuple[int, int], torch.Tensor]],
    reduction: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """LayerNorm's statistics over the channels of all resized levels, [B, n, n] with n = n_0 / reduction.

    Args:
        widths: channels of the levels.
        centres: means of their pixels over their channels, [B, n_s, n_s].
        products: their `_inner_products`. The square of a resized pixel is a sum of inner products of the coarse pixels
            that it is made of.
        reduction: of the fine map.

    Returns:
        For every level, how far the mean over its channels is from the mean over all channels; and the inverse standard
        deviation over all channels.
    """
    fine, channels = centres[0].shape[1], sum(widths)
    # One number is subtracted everywhere in a picture, so that a large offset does not drown the differences.
    offset = sum(centre.mean((1, 2), keepdim=True) * c for centre, c in zip(centres, widths)) / channels
    means, squares = [], 0
    for centre, inner in zip(centres, products):
        n = centre.shape[1]
        resize, span = resize_matrix(fine, n, reduction, centre.device, centre.dtype), neighbours(fine, n, reduction)
        means.append(resize @ (centre - offset) @ resize.mT)
        for (down, across), product in inner.items():
            if max(down, across) < span:
                pairs = (
                    (resize[:, : n - down] * resize[:, down:])
                    @ product
                    @ (resize[:, : n - across] * resize[:, across:]).mT
                )
                squares = squares + (2 * pairs if down or across else pairs)
    mean = sum(m * c for m, c in zip(means, widths)) / channels
    deviations = [m - mean for m in means]
    variance = (squares + sum(c * d.square() for d, c in zip(deviations, widths))) / channels
    return deviations, torch.rsqrt(variance.clamp(min=0) + LAYER_NORM_EPS)


def _inner_products(
    level: torch.Tensor, centre: torch.Tensor, span: int, *, in_steps: bool
) -> dict[tuple[int, int], torch.Tensor]:
    """Inner products, over the channels, of every pixel of a level less its mean with its neighbours.

    Args:
        level: [B, n, n, C].
        centre: [B, n, n], its mean over the channels.
        span: neighbours are less than this many pixels away.
        in_steps: process `ROWS` rows at a time.

    Returns:
        For each (down, across) the products [B, n - down, n - across] of pixels that far apart, summed over both
        diagonals.
    """
    n = level.shape[1]
    step = ROWS if in_steps else n
    products = {(down, across): [] for down in range(min(span, n)) for across in range(min(span, n))}
    for top in range(0, n, step):
        rows = slice(top, top + step + span - 1)
        x = level[:, rows].to(centre.dtype) - centre[:, rows, :, None]
        for (down, across), found in products.items():
            count = min(step, n - top - down)
            if count <= 0:
                continue
            here, there = x[:, :count], x[:, down : down + count]
            if not (down or across):
                # The vector norm takes one pass less than a product and a sum.
                found.append(torch.linalg.vector_norm(here, dim=-1).square())
                continue
            product = (here[:, :, : n - across] * there[:, :, across:]).sum(-1)
            if down and across:
                product = product + (here[:, :, across:] * there[:, :, : n - across]).sum(-1)
            found.append(product)
    return {apart: torch.cat(found, dim=1) for apart, found in products.items()}
