"""Resizes pictures to both resolutions in PyTorch: the `torch` backend of `ops.dual_resize`.

A picture is squared, resized bicubically with Pillow's own bits, normalised, and made into low-resolution views. Pillow
resizes 8-bit pictures in whole numbers: the filter's weights are rounded to multiples of 2**-22, columns are resized
before rows, and the picture between the two passes is rounded to 8 bits. All sums stay below 2**53, so float64 holds
them exactly, in any order.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...errors import PictureError
from ...runtime.device_tables import cached_on_device, upload
from ..reference import low_resolution_views

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# int(255 * mean) of each channel.
PAD_COLOUR = (122, 116, 104)
# A canvas of 18,918 pixels a side, which takes about 1 GiB. Squaring a longer picture by padding would only fill the
# machine's memory.
MAX_CANVAS_PIXELS = 4 * 89_478_485
# Fraction bits of a weight in fixed point: Pillow's PRECISION_BITS.
FRACTION_BITS = 22
# Outputs that one matrix product makes, and values of the picture that are held in float64 at the same time.
BLOCK, CHUNK = 32, 2**19
# Bytes of the tables of one kind that are kept on devices: enough for 8 camera pictures in HD, or more.
TABLE_BYTES = 2**25


class Side(NamedTuple):
    """One side of a picture on its way to the result, in pixels.

    Attributes:
        length: length of the picture.
        offset: offset of the picture on the canvas.
        canvas: length of what is resized: the picture, or the square that it is padded to.
        resized: length that the canvas is resized to.
        begin: where the result begins within what is resized.
        size: length of the result.
    """

    length: int
    offset: int
    canvas: int
    resized: int
    begin: int
    size: int


def place(width: int, height: int, size: int, pad: bool) -> tuple[Side, Side]:
    """The horizontal and vertical sides of a picture squared to size x size, by padding or by cropping the centre.

    Raises:
        PictureError: the picture is too thin or too large.
    """
    long, short = max(width, height), min(width, height)
    if pad:
        if short * size < long:
            raise PictureError(
                f"{width}x{height} pixels: too thin, squared and resized to {size}x{size} its short side is under one "
                "pixel"
            )
        if long * long > MAX_CANVAS_PIXELS:
            limit = math.isqrt(MAX_CANVAS_PIXELS)
            raise PictureError(
                f"{width}x{height} pixels: too large to square by padding, the longest side may be {limit}"
            )
        horizontal, vertical = (Side(n, (long - n) // 2, long, size, 0, size) for n in (width, height))
        return horizontal, vertical
    scaled = size if width == height else int(size * long / short)
    if size * scaled > MAX_CANVAS_PIXELS:
        raise PictureError(
            f"{width}x{height} pixels: too thin, its shortest side resized to {size} makes the other one {scaled}"
        )
    wide, high = (scaled, size) if width > height else (size, scaled)
    return Side(width, 0, width, wide, (wide - size) // 2, size), Side(
        height, 0, height, high, (high - size) // 2, size
    )


def square(image: Image.Image, size: int, pad: bool) -> Image.Image:
    """Squares an RGB picture to size x size with Pillow, as the original does.

    Raises:
        PictureError: the picture is too thin or too large.
    """
    x, y = place(image.width, image.height, size, pad)
    if (x.canvas, y.canvas) != image.size:
        canvas = Image.new("RGB", (x.canvas, y.canvas), PAD_COLOUR)
        canvas.paste(image, (x.offset, y.offset))
        image = canvas
    if pad:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    # Columns are resized first, as Pillow always did. For tall pictures Pillow 13 changes the order, and with it the
    # rounding between the passes.
    image = image.resize((x.resized, image.height), Image.Resampling.BICUBIC).resize(
        (x.resized, y.resized), Image.Resampling.BICUBIC
    )
    return image.crop((x.begin, y.begin, x.begin + size, y.begin + size))


@functools.lru_cache(maxsize=1)
def level_tables() -> np.ndarray:
    """The normalised value (u8 / 255 - mean) / std of every channel and level, [3, 256] float32.

    Each step is rounded to float32, as the original's processor does it.
    """
    levels = (np.arange(256) / 255).astype(np.float32)
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    return np.ascontiguousarray(((levels[:, None] - mean) / std).T)


def normalise(image: Image.Image) -> torch.Tensor:
    """An RGB image as [3, H, W] float32: (u8 / 255 - mean) / std, with each step rounded as in `level_tables`."""
    # One table of 256 values per channel gives every pixel bit for bit.
    pixels = np.asarray(image)
    return torch.from_numpy(np.stack([np.take(table, pixels[..., c]) for c, table in enumerate(level_tables())]))


def bicubic_taps(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that make up each pixel of the result, and their weights.

    This repeats Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`, in their order of operations.

    Returns:
        first: [size] int32, the first tap as a pixel of the picture; taps outside the picture have the colour of the
            padding.
        weights: [size, K] int32, in units of 2**-22; zero for taps outside the canvas.
    """
    scale = side.canvas / side.resized
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(side.begin, side.begin + side.size) + 0.5) * scale
    # Both are truncated towards zero, as C does it.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), side.canvas)
    taps = first[:, None] + np.arange((end - first).max())
    x = np.abs((taps - centre[:, None] + 0.5) * (1.0 / stretch))
    # Keys' cubic filter with a = -0.5.
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where((taps < end[:, None]) & (x < 2.0), np.where(x < 1.0, near, far), 0.0)
    # The weights are added one after another, as Pillow adds them.
    total = np.add.accumulate(weights, axis=1)[:, -1:]
    weights = weights / total * (1 << FRACTION_BITS)
    fixed = np.where(weights < 0, weights - 0.5, weights + 0.5).astype(np.int32)
    return (first - side.offset).astype(np.int32), fixed


@functools.lru_cache(maxsize=64)
def span(side: Side) -> tuple[int, int]:
    """The range [low, high) of the picture's pixels that the result is made of; a crop leaves some out."""
    first, weights = bicubic_taps(side)
    return max(int(first.min()), 0), min(int(first.max()) + weights.shape[1], side.length)


class ResizeBlock(NamedTuple):
    """Makes outputs [begin, end) of a side from pixels [first, last) of the picture and a share of the padding.

    Attributes:
        weights: [last - first, end - begin] float64, for a matrix product.
        padding: [end - begin] float64, the weight of the taps outside the picture.
        padded: whether there are such taps.
    """

    begin: int
    end: int
    first: int
    last: int
    weights: torch.Tensor
    padding: torch.Tensor
    padded: bool


@cached_on_device(TABLE_BYTES)
def _blocks(side: Side, device: torch.device) -> list[ResizeBlock]:
    first, fixed = bicubic_taps(side)
    positions = first[:, None] + np.arange(fixed.shape[1])
    used = (fixed != 0) & (positions >= 0) & (positions < side.length)
    scaled = fixed / (1 << FRACTION_BITS)
    # A block that sees only padding needs an empty slice of the picture, which is placed here.
    seen = span(side)[0]
    blocks = []
    for begin in range(0, side.size, BLOCK):
        rows = slice(begin, min(begin + BLOCK, side.size))
        inside = positions[rows][used[rows]]
        low, high = (int(inside.min()), int(inside.max()) + 1) if inside.size else (seen, seen)
        weights = np.zeros((high - low, rows.stop - begin))
        weights[inside - low, np.nonzero(used[rows])[0]] = scaled[rows][used[rows]]
        padding = np.where(used[rows], 0.0, scaled[rows]).sum(1)
        tensors = (upload(array, device) for array in (weights, padding))
        blocks.append(ResizeBlock(begin, rows.stop, low, high, *tensors, bool(padding.any())))
    return blocks


def _rounded(sums: torch.Tensor) -> torch.Tensor:
    """Rounds sums to 8 bits as Pillow does it, still in float64."""
    return sums.add_(0.5).floor_().clamp_(0, 255)


def dual_resize(
    picture: torch.Tensor, hr_size: int, lr_size: int, *, grid: int = 1, global_view: bool = False, pad: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mg_fast.ops.dual_resize` in PyTorch, on any device that has float64."""
    x, y = place(picture.shape[1], picture.shape[0], hr_size, pad)
    device = picture.device
    columns, rows = _blocks(x, device), _blocks(y, device)
    colour = torch.tensor(PAD_COLOUR, dtype=torch.float64, device=device)[:, None]

    low, high = span(y)
    between = torch.empty(high - low, 3, hr_size, dtype=torch.uint8, device=device)
    step = max(CHUNK // (3 * picture.shape[1]), 1)
    for begin in range(low, high, step):
        chunk = picture[begin : min(begin + step, high)].permute(0, 2, 1)
        height, chunk = len(chunk), chunk.to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)
        resized = torch.empty(len(chunk), hr_size, dtype=torch.float64, device=device)
        for block in columns:
            torch.mm(chunk[:, block.first : block.last], block.weights, out=resized[:, block.begin : block.end])
            if block.padded:
                resized[:, block.begin : block.end] += (colour * block.padding).repeat(height, 1)
        between[begin - low : begin - low + height] = _rounded(resized).view(height, 3, hr_size)
    # This is a row of the padding. It is not exactly the colour, because its weights do not sum to exactly one.
    empty = _rounded(torch.cat([colour * (block.weights.sum(0) + block.padding) for block in columns], dim=1)).flatten()

    tables = torch.from_numpy(level_tables()).to(device).flatten()
    shift = torch.arange(0, 768, 256, device=device)[:, None]
    hr = torch.empty(3, hr_size, hr_size, device=device)
    for block in rows:
        window = between[block.first - low : block.last - low].flatten(1).to(torch.float64)
        sums = block.weights.T @ window
        if block.padded:
            sums += block.padding[:, None] * empty
        levels = _rounded(sums).long().view(-1, 3, hr_size).add_(shift)
        hr[:, block.begin : block.end] = torch.take(tables, levels).transpose(0, 1)
    return hr, views_of(hr, lr_size, grid=grid, global_view=global_view)


@functools.lru_cache(maxsize=8)
def bilinear_taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 and weights float32, both [2, after], by which F.interpolate on this CPU resizes `before` pixels.

    They are read off F.interpolate rather than computed, because its positions are float32, and its compiler decides
    whether a product and a sum are rounded once or twice.
    """
    # The values are needed even where tensors are fake because code is only compiled.
    with unset_fake_temporarily():
        probe = F.interpolate(
            torch.eye(before, dtype=torch.float32, device="cpu")[None, None],
            size=(after, before),
            mode="bilinear",
            align_corners=False,
        )[0, 0]
        low = (probe != 0).int().argmax(1, keepdim=True)
        high = (low + 1).clamp(max=before - 1)
        weight = torch.where(high > low, probe.gather(1, high), 0.0)
        return torch.cat([low, high], 1).T.numpy(), torch.cat([1 - weight, weight], 1).T.numpy()


def view_taps(hr_size: int, lr_size: int, grid: int, global_view: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions and weights [T, n] from the HR picture along a side.

    The first pair is for the canvas of tiles (T = 2), the second for the global view (T = 4), if it is wanted.
    """
    positions, weights = bilinear_taps(hr_size, lr_size * grid)
    taps = [(positions, weights)]
    if global_view:
        p, w = bilinear_taps(lr_size * grid, lr_size)
        taps.append(
            (
                np.concatenate(list(positions[:, p].swapaxes(0, 1))),
                np.concatenate(list((weights[:, p] * w).swapaxes(0, 1))),
            )
        )
    return taps


def views_of(hr: torch.Tensor, lr_size: int, *, grid: int, global_view: bool) -> torch.Tensor:
    """Views [V, 3, LR, LR] of hr [3, HR, HR]: `reference.low_resolution_views` with the CPU's weights on any device."""
    if hr.device.type == "cpu":
        return low_resolution_views(hr[None], lr_size, grid=grid, global_view=global_view)[0]
    return views_by_taps(hr, lr_size, grid=grid, global_view=global_view)


def views_by_taps(hr: torch.Tensor, lr_size: int, *, grid: int, global_view: bool) -> torch.Tensor:
    """`views_of` from tables, because F.interpolate's positions on another device may round to other weights."""
    canvases = []
    for positions, weights in view_taps(hr.shape[-1], lr_size, grid, global_view):
        taps = list(zip(torch.from_numpy(positions).to(hr.device), torch.from_numpy(weights).to(hr.device)))
        columns = sum(hr.index_select(2, p) * w for p, w in taps)
        canvases.append(sum(columns.index_select(1, p) * w[:, None] for p, w in taps))
    tiles = canvases[0].view(3, grid, lr_size, grid, lr_size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([tiles, *(whole[None] for whole in canvases[1:])])
