"""The sizes of several maps that lie one after the other: what may be passed, and what the kernels can number."""

from collections.abc import Sequence

import torch

from ..errors import quoted
from ..runtime.arguments import whole_number

# The longest side that float32 counts exactly, and the most pixels that 32 bits can number.
MAX_SIDE, MAX_PIXELS = 2**24, 2**31 - 1


def host_sizes(spatial_shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes that were checked, as pairs of ints."""
    # To convert an int would make it a constant of a trace, which then would not serve pictures of other sizes.
    return [tuple(side if isinstance(side, int) else int(side) for side in size) for size in spatial_shapes]


def check_spatial_shapes(operation: str, spatial_shapes: Sequence[tuple[int, int]], pixels: int) -> None:
    """Raises ValueError unless the sizes are pairs of positive whole numbers on the host that add up to `pixels`."""
    if isinstance(spatial_shapes, torch.Tensor):
        raise ValueError(
            f"{operation}: spatial_shapes must be a list of (h, w) on the host, got a tensor on "
            f"{spatial_shapes.device}: pass spatial_shapes.tolist() once, outside of the loop that calls this"
        )
    if not isinstance(spatial_shapes, (list, tuple)):
        raise ValueError(f"{operation}: spatial_shapes must be a list of pairs (h, w), got {quoted(spatial_shapes)}")
    for size in spatial_shapes:
        pair = isinstance(size, (list, tuple)) and len(size) == 2
        # The sizes of a trace are ints, too, which may stand for any number.
        if not pair or not all((side if isinstance(side, int) else whole_number(side) or 0) > 0 for side in size):
            raise ValueError(
                f"{operation}: spatial_shapes must be pairs (h, w) of positive numbers, got {quoted(size)}"
            )
    expected = sum(h * w for h, w in host_sizes(spatial_shapes))
    if not spatial_shapes or expected != pixels:
        raise ValueError(
            f"{operation}: the levels {quoted(list(spatial_shapes))} have {expected} pixels, but value has {pixels}"
        )


def pairs(sides: Sequence[int]) -> list[tuple[int, int]]:
    """The sizes (h, w) in a flat list of them, as an operator of torch takes them."""
    return list(zip(sides[::2], sides[1::2]))


def too_large(spatial_shapes: Sequence[tuple[int, int]], pixels: int) -> str | None:
    """Why the kernels that sample maps cannot number the pixels of these; None where they can."""
    if max(side for size in spatial_shapes for side in size) > MAX_SIDE:
        return f"the kernel counts the pixels of a side in float32, up to {MAX_SIDE}, got {quoted(spatial_shapes)}"
    if pixels > MAX_PIXELS:
        return f"the kernel numbers pixels in 32 bits, up to {MAX_PIXELS}, got {pixels}"
    return None
