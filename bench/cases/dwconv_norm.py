"""The first half of a ConvNeXt block, at the shapes that ConvNeXt-L gives it."""

import torch

from mg_fast.kernels import configs

from ..costs import operators as costs
from ..registry import Case
from . import operations
from .operations import POWERS, Launch, StageMap, Tunable


def cases() -> list[Case]:
    return [_case(stage_map) for stage_map in operations.stage_maps()]


def _case(stage_map: StageMap) -> Case:
    channels, pixels = stage_map.channels, stage_map.pixels
    least = costs.dwconv_norm(pixels, channels, stage_map.dtype.itemsize)
    shapes = [stage_map.shape, (49, channels), *[(channels,)] * 3]
    return operations.tensors_case("dwconv_norm", stage_map, shapes, least)


def launches() -> dict[str, Launch]:
    """The kernel of float32, and the two of 16 bits."""
    launch = operations.tensors_launch("dwconv_norm", (1, 5, 6, 64), (49, 64), *[(64,)] * 3)
    return {
        "dwconv_norm": launch._replace(dtypes=(torch.float32,)),
        "dwconv_norm on tensor cores": launch._replace(dtypes=(torch.bfloat16,)),
    }


def tunable() -> Tunable:
    space = {"rows": (2, 3, 4, 6, 8, 12, 16), "columns": POWERS[:6], "channels": POWERS[1:], "warps": POWERS[1:5]}
    return Tunable(space, _fits, _problems)


def _problems() -> list[tuple[object, Case]]:
    # In bfloat16 the maps are convolved on tensor cores.
    maps = operations.stage_maps(["bfloat16"], [1])
    return [(configs.dwconv_bands_bucket(stage_map.channels), _case(stage_map)) for stage_map in maps]


def _fits(key: tuple, tile: configs.ConvolutionTile | configs.BandsTile, shared: int) -> bool:
    if isinstance(tile, configs.BandsTile):
        if tile.rows % 2 or tile.columns not in (8, 16, 32) or tile.channels not in (2, 4, 8):
            return False
        # A thread holds the results of its strips, and the bands, in which each result of a group has two numbers.
        return tile.rows * tile.channels + 8 * tile.channels <= operations.MOST_REGISTERS
    chunks = -(-key[0] // tile.channels)
    loaded = tile.columns * tile.channels // (32 * tile.warps)
    # A thread holds every chunk of every row, and all of them are unrolled.
    return loaded >= 1 and chunks <= 4 and loaded * tile.rows * chunks <= operations.MOST_REGISTERS
