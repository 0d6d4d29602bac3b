"""Tiles and warps per (kernel, GPU architecture, shape bucket), and the limits of the architectures they are made for.

Data only: launches take their tiles from here, nothing is tuned at run time.
"""

from collections.abc import Iterable
from typing import NamedTuple

# shared memory in bytes that one block may use, by compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"): ahead-of-time compiling fails a configuration that needs more
SHARED_MEMORY_LIMITS = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


class Tile(NamedTuple):
    """Channels that are loaded at once, warps of a program, stages of its software pipeline."""

    channels: int
    warps: int
    stages: int


# by compute capability (None: any, where that has no entry of its own), then by bytes of an element of the maps, pixels of a window rounded
# up to a power of two, and whether the levels' widths are such that pixels are loaded 16 bytes at once. Where they are not, every element
# has an address of its own, and larger tiles run out of registers. `reduced`: for a global view, where it needs a tile of its own.
PATCH_MINING = {
    None: {
        (2, 16, True): Tile(64, 2, 2),
        (2, 64, True): Tile(64, 4, 2),
        (2, 128, True): Tile(32, 8, 2),
        (2, 256, True): Tile(32, 8, 2),
        (4, 16, True): Tile(64, 2, 2),
        (4, 64, True): Tile(32, 4, 2),
        (4, 128, True): Tile(32, 8, 2),
        (4, 256, True): Tile(32, 8, 2),
        (2, 16, False): Tile(16, 2, 2),
        (2, 64, False): Tile(16, 4, 2),
        (2, 128, False): Tile(8, 8, 1),
        (2, 256, False): Tile(8, 16, 1),
        (4, 16, False): Tile(16, 2, 2),
        (4, 64, False): Tile(16, 4, 2),
        (4, 128, False): Tile(8, 8, 1),
        (4, 256, False): Tile(8, 16, 1),
    },
    # where the default would spill
    80: {(2, 64, True, "reduced"): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    86: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    89: {(2, 64, True): Tile(64, 8, 2), (4, 64, True, "reduced"): Tile(16, 4, 2)},
    120: {(2, 64, True): Tile(64, 8, 2), (4, 16, True): Tile(32, 2, 2)},
}


def patch_mining_bucket(element_size: int, side: int, widths: Iterable[int]) -> tuple[int, int, bool]:
    """The bucket of windows of side x side pixels of levels of these widths."""
    # Triton knows of a stride whether it is a multiple of 16, and no more
    return element_size, next(pixels for pixels in (16, 64, 128, 256) if side * side <= pixels), all(width % 16 == 0 for width in widths)


def patch_mining_tile(architecture: int | None, element_size: int, side: int, widths: Iterable[int], *, reduced: bool) -> Tile:
    """The tile of their bucket on a GPU of this compute capability (90 for 9.0), for a map that is reduced or not."""
    table = PATCH_MINING[None] | PATCH_MINING.get(architecture, {})
    bucket = patch_mining_bucket(element_size, side, widths)
    return reduced and table.get((*bucket, "reduced")) or table[bucket]


class ResizeTile(NamedTuple):
    """Rows and columns that a program makes, its warps."""

    rows: int
    columns: int
    warps: int


# by compute capability (None: any, where that has no entry of its own), then by pass: of a picture's columns, then of its rows
DUAL_RESIZE = {None: {"columns": ResizeTile(4, 128, 4), "rows": ResizeTile(4, 128, 4)}}


def dual_resize_tile(architecture: int | None, stage: str) -> ResizeTile:
    """The tile of a pass on a GPU of this compute capability (90 for 9.0)."""
    return (DUAL_RESIZE[None] | DUAL_RESIZE.get(architecture, {}))[stage]
