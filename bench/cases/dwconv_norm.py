"""The first half of a ConvNeXt block, at the shapes that ConvNeXt-L gives it."""

from ..registry import Case, Cost
from .operations import Launch, StageMap, stage_maps, tensors_case, tensors_launch


def cases() -> list[Case]:
    return [_case(stage_map) for stage_map in stage_maps()]


def _case(stage_map: StageMap) -> Case:
    channels, pixels = stage_map.channels, stage_map.pixels
    least = Cost(2 * 49 * pixels * channels, (2 * pixels + 52) * channels * stage_map.dtype.itemsize)
    return tensors_case("dwconv_norm", stage_map, [stage_map.shape, (49, channels), *[(channels,)] * 3], least)


def launches() -> dict[str, Launch]:
    return {"dwconv_norm": tensors_launch("dwconv_norm", (1, 5, 6, 64), (49, 64), (64,), (64,), (64,))}
