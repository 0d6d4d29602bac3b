"""The first half of a ConvNeXt block, at the shapes that ConvNeXt-L gives it."""

import math

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
    return {"dwconv_norm": operations.tensors_launch("dwconv_norm", (1, 5, 6, 64), (49, 64), *[(64,)] * 3)}


def tunable() -> Tunable:
    space = {"rows": (2, 3, 4, 6, 8, 12), "columns": POWERS[:5], "channels": POWERS[5:], "warps": POWERS[1:5]}
    return Tunable(space, _fits, _problems)


def _problems() -> list[tuple[object, Case]]:
    found = []
    for stage_map in operations.stage_maps(["bfloat16"], [1]):
        strides = [math.prod(stage_map.shape[i:]) for i in (1, 2, 3)]
        found.append((configs.dwconv_norm_bucket(stage_map.channels, strides), _case(stage_map)))
    return found


def _fits(key: tuple, tile: configs.ConvolutionTile, shared: int) -> bool:
    chunks = -(-key[0] // tile.channels)
    loaded = tile.columns * tile.channels // (32 * tile.warps)
    # A thread holds every chunk of every row, and all of them are unrolled.
    return loaded >= 1 and chunks <= 4 and loaded * tile.rows * chunks <= operations.MOST_REGISTERS
