"""The cost of single operators; the formulas for whole modules are sums of these.

`itemsize` is the bytes of one element.
"""

import torch

from mg_fast.ops.operation import operators, product_flop

from ..registry import Cost

FLOAT32 = 4


def attention_flop(pairs: int, width: int, value_width: int | None = None) -> int:
    """FLOP of attention over pairs of a query and a key of all heads, masked or not: scores, and sums of values.

    Queries and keys have `width` channels, and values as many or `value_width`.
    """
    return product_flop(pairs, width, 1) + product_flop(pairs, value_width or width, 1)


def depthwise_flop(elements: int) -> int:
    """FLOP of ConvNeXt's 7x7 depthwise convolution of a map, as the record of `dwconv_norm` declares them."""
    declared = operators()["mg_fast::dwconv_norm"].flop
    return declared(torch.empty(elements, device="meta"), torch.empty(49, device="meta"))


def copy(size: int) -> Cost:
    """An operator that reads `size` bytes and writes as many."""
    return Cost(0, size, size)


def cast(elements: int, before: int, after: int) -> Cost:
    """A change of dtype between two itemsizes; equal ones cost nothing."""
    return Cost(0, elements * before, elements * after) * (before != after)


def resize(before: int, after: int, itemsize: int) -> Cost:
    """Resizing in float32 between two numbers of elements, with the casts around it."""
    resized = Cost(0, before * FLOAT32, after * FLOAT32)
    return cast(before, itemsize, FLOAT32) + resized + cast(after, FLOAT32, itemsize)


def layer_norm(rows: int, width: int, itemsize: int) -> Cost:
    """LayerNorm with gain and bias, which also writes a mean and a deviation per row in float32."""
    return Cost(0, (rows * width + 2 * width) * itemsize, rows * (width * itemsize + 2 * FLOAT32))


def linear(rows: int, width: int, out: int, itemsize: int) -> Cost:
    """A linear layer with a bias."""
    read = rows * width + width * out + out
    return Cost(product_flop(rows, width, out), read * itemsize, rows * out * itemsize)


def linear_residual(rows: int, width: int, out: int, itemsize: int) -> Cost:
    """A linear layer whose kernel also reads the map that it adds its result to."""
    return linear(rows, width, out, itemsize) + Cost(0, rows * out * itemsize)


def patch_convolution(pixels: int, channels: int, patches: int, out: int, side: int, itemsize: int) -> Cost:
    """A convolution of side x side pixels that do not overlap: all pixels in, one row per patch out."""
    weight = side**2 * channels * out
    read = pixels * channels + weight + out
    return Cost(product_flop(patches, side**2 * channels, out), read * itemsize, patches * out * itemsize)


def dwconv_norm(pixels: int, channels: int, itemsize: int) -> Cost:
    """The kernel for a 7x7 depthwise convolution and its norm: 49 taps and three vectors of weights per channel."""
    read = (pixels + 49 + 3) * channels
    return Cost(depthwise_flop(pixels * channels), read * itemsize, pixels * channels * itemsize)


def depthwise_convolution(pixels: int, channels: int, itemsize: int) -> Cost:
    """The library's 7x7 depthwise convolution with a bias."""
    read = (pixels + 49 + 1) * channels
    return Cost(depthwise_flop(pixels * channels), read * itemsize, pixels * channels * itemsize)
