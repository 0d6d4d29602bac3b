"""Patch info mining by another algebra, in PyTorch: the `torch` backend, for any device.

Exact, not an approximation. With one query to a window the key and value projections move off the pixels:

- scores: q . (W_k (g x̂ + b) + c) = (g * W_k^T q) . x̂ + constant, and a constant cancels in the softmax; so the QUERY is projected
  to the pyramid's channels, once, instead of every pixel to the queries' width;
- values: the weights sum to 1, so the normalised pixels are pooled first and projected once;
- upsampling is linear: a window of the fine map is a fixed small matrix R times the coarse pixels under it, so scores, channel sums
  and squared norms are computed on the coarse pixels and interpolated as scalars (norms through the Gram matrix of the window's
  coarse pixels), and no upsampled or concatenated map exists.

By count of the products, 435 GFLOP become 8 for a picture of 768 pixels. Windows share their borders, so coarse pixels are read
more than once. Under torch.compile sizes must be static (dynamic=False): the tables of the windows are made from them.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .reference import LAYER_NORM_EPS, Projection


def patch_mining(
    queries: torch.Tensor, pyramid: Sequence[torch.Tensor], query: Projection, key: Projection, value: Projection, *, grid: int = 1
) -> torch.Tensor:
    """Same arguments and result as `reference.patch_mining`. Accumulates in float32 (float64 for float64 inputs)."""
    b, views, n, d = queries.shape
    channels, side = key.weight.shape[1], int(n**0.5)
    cells = grid * grid
    # gains of the key's LayerNorm and the scale of the scores go to the query; its bias and the key's cancel in the softmax
    # float16 alone could overflow in this product
    wide = torch.float32 if queries.dtype == torch.float16 else queries.dtype
    absorbed = F.linear(query(queries).to(wide), key.weight.t().to(wide)) * (key.norm_weight * d**-0.5)

    # the cells lie side by side on one raster, so that a window at a cut sees the neighbouring cell's pixels as the upsampled map does
    raster = absorbed[:, :cells].reshape(b, grid, grid, side, side, channels).transpose(2, 3).reshape(b, grid * side, grid * side, channels)
    pooled = _pool_windows(raster, pyramid)
    pooled = pooled.reshape(b, grid, side, grid, side, channels).transpose(2, 3).reshape(b, cells, n, channels)
    if views > cells:
        whole = _pool_windows(
            absorbed[:, cells].reshape(b, side, side, channels), [_reduce(level, pyramid[0].shape[1], grid) for level in pyramid]
        )
        pooled = torch.cat([pooled, whole.reshape(b, 1, n, channels)], dim=1)
    if torch.is_grad_enabled():
        # the key's biases have a gradient of zero, not none: optimisers and data-parallel wrappers look for it
        pooled = pooled + 0.0 * (key.norm_bias.sum() + key.bias.sum())
    pooled = (pooled * value.norm_weight + value.norm_bias).to(queries.dtype)
    return F.linear(pooled, value.weight, value.bias)


def _reduce(level: torch.Tensor, fine: int, grid: int) -> torch.Tensor:
    """A level of the pyramid as the global view sees it: of the map upsampled to `fine` and then reduced by `grid`.

    Levels from which upsampling to the reduced size at once is the same linear map are left as they are.

    level: [B, n, n, C] -> itself, or [B, fine / grid, fine / grid, C] in the accumulator's dtype.
    """
    n, target = level.shape[1], fine // grid
    if _is_plain(fine, n, grid):
        return level
    out = level.to(_accumulator(level.dtype))
    starts, weights = _starts(target, fine, n, target), _weights(target, fine, n, target)
    weights = weights.to(out.device, out.dtype)[:, 0]
    for axis in (1, 2):
        taps = weights.reshape([-1 if d == axis else 1 for d in range(4)] + [weights.shape[1]])
        index = torch.tensor(starts, device=out.device)
        out = sum(out.index_select(axis, index + k) * taps[..., k] for k in range(weights.shape[1]))
    return out


def _bilinear(out: int, size: int) -> torch.Tensor:
    """The matrix [out, size], float64, of F.interpolate's bilinear resizing (align_corners=False) along one axis."""
    position = ((torch.arange(out, dtype=torch.float64, device="cpu") + 0.5) * (size / out) - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    matrix = torch.zeros(out, size, dtype=torch.float64, device="cpu")
    rows = torch.arange(out, device="cpu")
    matrix[rows, low] += 1 - (position - low)
    matrix[rows, high] += position - low
    return matrix


# Tables depend on sizes alone and are kept on the CPU, whatever the default device is; under torch.compile they are constants of the graph.


@torch.compiler.assume_constant_result
def _is_plain(fine: int, size: int, grid: int) -> bool:
    """Whether upsampling to `fine` and reducing by `grid` equals upsampling to the reduced size, which is larger, at once."""
    return _plain(fine, size, fine // grid)


@functools.lru_cache(maxsize=64)
def _plain(fine: int, size: int, target: int) -> bool:
    return size < target and torch.equal(_bilinear(target, fine) @ _bilinear(fine, size), _bilinear(target, size))


@functools.lru_cache(maxsize=64)
def _table(out: int, fine: int, size: int, regions: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Which of `size` coarse pixels each region of an `out` map depends on along one axis, and with which weights.

    The map is upsampled to `fine` and, where `out` is smaller, reduced. Windows at the end are moved inwards, so that all are equally wide.
    """
    matrix = _bilinear(fine, size) if out == fine else _bilinear(out, fine) @ _bilinear(fine, size)
    side = out // regions
    used = [matrix[r * side : (r + 1) * side].any(0).nonzero().flatten() for r in range(regions)]
    width = max(int(u[-1] - u[0]) + 1 for u in used)
    starts = tuple(min(int(u[0]), size - width) for u in used)
    return starts, torch.stack([matrix[r * side : (r + 1) * side, s : s + width] for r, s in enumerate(starts)])


@torch.compiler.assume_constant_result
def _starts(out: int, fine: int, size: int, regions: int) -> tuple[int, ...]:
    """First coarse pixel of every region's window."""
    return _table(out, fine, size, regions)[0]


@torch.compiler.assume_constant_result
def _weights(out: int, fine: int, size: int, regions: int) -> torch.Tensor:
    """Weights [regions, out / regions, K], float64, that make a region's pixels of its window's K."""
    return _table(out, fine, size, regions)[1]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pool_windows(absorbed: torch.Tensor, pyramid: Sequence[torch.Tensor]) -> torch.Tensor:
    """Softmax-weighted mean of every window's normalised pixels.

    Args:
        absorbed: [B, G, G, C], the projected queries on their raster.
        pyramid: [B, n_s, n_s, C_s]; the first level is the fine map, whose G x G windows the queries look at.

    Returns:
        [B, G, G, C] in the accumulator's dtype.
    """
    dtype = _accumulator(pyramid[0].dtype)
    absorbed = absorbed.to(dtype)
    b, g, _, channels = absorbed.shape
    fine = pyramid[0].shape[1]
    parts = absorbed.split([level.shape[-1] for level in pyramid], dim=-1)
    total = absorbed.sum(-1)
    # the result does not change when one number is taken off every channel of every pixel, but the variance of features with a large
    # common offset would drown in rounding
    offset = sum(level.sum((1, 2, 3), dtype=dtype) / level.shape[1] ** 2 for level in pyramid) / channels
    # what is not finite in one window stays in that window
    offset = offset.nan_to_num(0.0, 0.0, 0.0)

    # to the device once, not once a row
    tables = [_level_tables(level, g, fine, dtype) for level in pyramid]

    rows = []
    for r in range(g):
        scores = sums = squares = 0
        windows = []
        for level, part, table in zip(pyramid, parts, tables):
            x, weights = _row_of_windows(level, r, g, fine, offset, table)
            # one product for the query's and the channel sum's share
            both = torch.matmul(x, torch.stack([part[:, r], torch.ones_like(part[:, r])], dim=-1))
            if weights is None:
                norm = x.square().sum(-1)
            else:
                gram = torch.matmul(x, x.transpose(-1, -2))
                norm = (torch.matmul(weights, gram) * weights).sum(-1)
                both = torch.matmul(weights, both)
            scores, sums, squares = scores + both[..., 0], sums + both[..., 1], squares + norm
            windows.append((x, weights))
        mean = sums / channels
        inverse = torch.rsqrt((squares / channels - mean.square()).clamp(min=0) + LAYER_NORM_EPS)
        attention = ((scores - mean * total[:, r, :, None]) * inverse).softmax(-1) * inverse
        pooled = [
            torch.matmul(attention[..., None, :] if weights is None else torch.matmul(attention[..., None, :], weights), x).squeeze(-2)
            for x, weights in windows
        ]
        rows.append(torch.cat(pooled, dim=-1) - (attention * mean).sum(-1, keepdim=True))
    return torch.stack(rows, dim=1)


def _level_tables(level: torch.Tensor, g: int, fine: int, dtype: torch.dtype):
    """First rows, columns [G * K] and weights [G, M, K] of a level's windows; None where the level is the fine map itself."""
    n = level.shape[1]
    if n == fine:
        return None
    starts, weights = _starts(fine, fine, n, g), _weights(fine, fine, n, g).to(level.device, dtype)
    columns = torch.tensor([s + i for s in starts for i in range(weights.shape[-1])], device=level.device)
    return starts, columns, weights


def _row_of_windows(level: torch.Tensor, r: int, g: int, fine: int, offset: torch.Tensor, tables):
    """The pixels of one level under the r-th row of windows.

    Returns:
        x [B, G, K * K, C], less the offset, and the weights [G, M * M, K * K] that make the window's fine pixels of them (None where the
        level is the fine map itself).
    """
    b, _, _, c = level.shape
    dtype = offset.dtype
    if tables is None:
        side = fine // g
        x = level[:, r * side : (r + 1) * side].reshape(b, side, g, side, c).transpose(1, 2).to(dtype) - offset[:, None, None, None, None]
        return x.reshape(b, g, side * side, c), None
    starts, columns, table = tables
    k = table.shape[-1]
    strip = level[:, starts[r] : starts[r] + k].to(dtype) - offset[:, None, None, None]
    x = strip.index_select(2, columns).reshape(b, k, g, k, c).transpose(1, 2).reshape(b, g, k * k, c)
    weights = torch.einsum("ia,gjb->gijab", table[r], table).reshape(g, -1, k * k)
    return x, weights
