"""The pointwise layers of a ConvNeXt block, at the shapes that ConvNeXt-L gives them."""

from ..registry import Case, Cost
from .operations import Launch, StageMap, stage_maps, tensors_case, tensors_launch


def cases() -> list[Case]:
    return [case(stage_map) for case in (_expansion, _contraction) for stage_map in stage_maps()]


def _expansion(stage_map: StageMap) -> Case:
    channels, pixels = stage_map.channels, stage_map.pixels
    least = Cost(
        8 * pixels * channels**2, (5 * pixels * channels + 4 * channels**2 + 4 * channels) * stage_map.dtype.itemsize
    )
    return tensors_case(
        "linear_gelu", stage_map, [(pixels, channels), (4 * channels, channels), (4 * channels,)], least
    )


def _contraction(stage_map: StageMap) -> Case:
    channels, pixels = stage_map.channels, stage_map.pixels
    least = Cost(
        8 * pixels * channels**2, (6 * pixels * channels + 4 * channels**2 + channels) * stage_map.dtype.itemsize
    )
    shapes = [(pixels, 4 * channels), (channels, 4 * channels), (channels,), (pixels, channels)]
    return tensors_case("linear_residual", stage_map, shapes, least)


def launches() -> dict[str, Launch]:
    return {
        "linear_gelu": tensors_launch("linear_gelu", (20, 64), (128, 64), (128,)),
        "linear_residual": tensors_launch("linear_residual", (20, 128), (64, 128), (64,), (20, 64)),
    }
