"""Tile sizes of the kernels that sample maps: deformable attention and the feature synchronizer.

This file belongs to configs.py, which imports all of its names and through which kernels take their tiles.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .compiler import TRITON


class SamplingTile(NamedTuple):
    """The tile of one program that samples maps.

    Attributes:
        elements: queries of a program times channels of a head, rounded up to a power of two.
        warps: warps of the program.
        unroll: points whose pixels may be on their way at the same time.
    """

    elements: int
    warps: int
    unroll: int


# Keyed by compute capability as above, then by the pass, the bytes of one element of the maps, and whether a thread
# loads several channels of a pixel at once. A thread has 8 channels of a query of 16-bit maps, and 4 of float32 maps,
# which are 16 bytes. The tiles were not tuned on a GPU.
DEFORMABLE_ATTENTION = {
    None: {
        ("forward", 2, True): SamplingTile(512, 2, 2),
        ("forward", 4, True): SamplingTile(512, 2, 2),
        ("forward", 2, False): SamplingTile(512, 4, 1),
        ("forward", 4, False): SamplingTile(512, 4, 1),
        ("backward", 2, True): SamplingTile(128, 1, 1),
        ("backward", 4, True): SamplingTile(128, 1, 1),
        ("backward", 2, False): SamplingTile(512, 4, 1),
        ("backward", 4, False): SamplingTile(512, 4, 1),
    },
}


if TRITON >= (3, 8):
    # With the tiles above it would spill up to 8 bytes of a thread, and in the backward pass up to 24.
    DEFORMABLE_ATTENTION[None] |= {
        ("forward", 2, True): SamplingTile(256, 1, 2),
        ("forward", 2, False): SamplingTile(256, 4, 1),
        ("backward", 2, False): SamplingTile(256, 4, 1),
        ("backward", 4, False): SamplingTile(256, 4, 1),
    }


def deformable_attention_bucket(
    stage: str, element_size: int, channels: int, strides: Iterable[int]
) -> tuple[str, int, bool]:
    """The bucket of maps: channels of a head, and strides between pictures, pixels and heads, in elements."""
    # Triton knows only whether a stride is a multiple of 16.
    return stage, element_size, channels % 8 == 0 and all(stride % 16 == 0 for stride in strides)


def deformable_attention_tile(
    architecture: int | None, stage: str, element_size: int, channels: int, strides: Iterable[int]
) -> SamplingTile:
    """The tile of one pass over these maps on a GPU of this compute capability (90 for 9.0)."""
    table = DEFORMABLE_ATTENTION[None] | DEFORMABLE_ATTENTION.get(architecture, {})
    return table[deformable_attention_bucket(stage, element_size, channels, strides)]


class SyncTile(NamedTuple):
    """The tile of one program of the synchronizer.

    Attributes:
        queries: queries of the program.
        pictures: pictures that are read at once.
        points: points of a picture that are read at once.
        channels: channels that are loaded at once.
        times: how many such groups of channels the program has.
        warps: warps of the program.
    """

    queries: int
    pictures: int
    points: int
    channels: int
    times: int
    warps: int


class SyncSlots(NamedTuple):
    """The limits from which a SyncTile is made.

    Attributes:
        slots: the most queries x pictures x points that are read at once, where points are rounded up to a power of
            two.
        channels: the most channels that are loaded at once.
        times: the most such groups of channels that a program has.
        share: how many numbers of the tile a thread holds for each group of channels.
    """

    slots: int
    channels: int
    times: int
    share: int


# Keyed by compute capability as above, then by the bytes of a value, by the number of queries, and by whether a load
# takes several channels at once. None was tuned on a GPU. With 32 channels at once, two of a warp's 16-bit pixels are a
# cache line, and each thread computes a sample's place once for 16 channels.
FEATURE_SYNC = {
    None: {
        (2, "few", True): SyncSlots(128, 32, 1, 8),
        (4, "few", True): SyncSlots(128, 32, 1, 8),
        (2, "some", True): SyncSlots(32, 32, 2, 8),
        (4, "some", True): SyncSlots(32, 16, 4, 4),
        (2, "many", True): SyncSlots(32, 32, 2, 8),
        (4, "many", True): SyncSlots(32, 16, 4, 4),
        (2, "few", False): SyncSlots(32, 32, 1, 4),
        (4, "few", False): SyncSlots(32, 32, 1, 4),
        (2, "many", False): SyncSlots(16, 32, 1, 4),
        (4, "many", False): SyncSlots(16, 32, 1, 4),
    }
}
# A program of a "few" queries has one of them, with many pictures at once, so that few loads wait for each other. One
# of "some" queries has several, with the points of one picture, so that there are enough programs. One of "many" takes
# point after point, which needs the fewest instructions, because nothing is added up across threads.
MOST_QUERIES = {"few": 16, "some": 512}


def feature_sync_bucket(
    element_size: int, queries: int, channels: int, strides: Iterable[int]
) -> tuple[int, str, bool]:
    """The bucket of that many queries of all rows; strides between rows, pictures, pixels and heads, in elements."""
    # Triton knows only whether a stride is a multiple of 16.
    wide = all(number % 16 == 0 for number in (channels, *strides))
    number = next((name for name, most in MOST_QUERIES.items() if queries <= most), "many")
    return element_size, number if wide or number == "few" else "many", wide


def feature_sync_tile(
    architecture: int | None,
    element_size: int,
    queries: int,
    pictures: int,
    points: int,
    channels: int,
    strides: Iterable[int],
) -> SyncTile:
    """The tile for queries of this number (of all rows), pictures of a row, points and channels of a head."""
    bucket = feature_sync_bucket(element_size, queries, channels, strides)
    slots, most, times, share = (FEATURE_SYNC[None] | FEATURE_SYNC.get(architecture, {}))[bucket]
    points, most = _power_of_two(points), min(most, _power_of_two(channels))
    times = max(1, min(times, -(-channels // most)))
    together, at_once = max(1, slots // points), 1
    if bucket[1] == "few":
        together, at_once = 1, min(together, _power_of_two(pictures))
    elif bucket[1] == "many":
        together, points = slots, 1
    warps = together * at_once * points * most // (32 * share)
    return SyncTile(together, at_once, points, most, times, min(max(warps, 1), 8))


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << max(number - 1, 0).bit_length()
