"""Tiles and warps per (kernel, GPU architecture, shape bucket), and the limits of the architectures they are made for.

Data only: launches take their tiles from here, nothing is tuned at run time.
"""

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


# by compute capability (None: any other), then by bytes of an element of the maps and pixels of a window, rounded up to a power of two
PATCH_MINING = {
    None: {
        (2, 16): Tile(64, 2, 2),
        (2, 64): Tile(64, 4, 2),
        (2, 128): Tile(32, 4, 2),
        (2, 256): Tile(32, 8, 2),
        (4, 16): Tile(64, 2, 2),
        (4, 64): Tile(32, 4, 2),
        (4, 128): Tile(32, 4, 2),
        (4, 256): Tile(32, 8, 2),
    },
}


def patch_mining_tile(architecture: int | None, element_size: int, side: int) -> Tile:
    """The tile for windows of side x side pixels on a GPU of this compute capability (90 for 9.0)."""
    table = PATCH_MINING.get(architecture, PATCH_MINING[None])
    return table[element_size, next(pixels for pixels in (16, 64, 128, 256) if side * side <= pixels)]
