"""The pointwise layers of a ConvNeXt block, at the shapes that ConvNeXt-L gives them."""

from mg_fast.kernels import configs

from ..costs import operators as costs
from ..registry import Case
from . import operations
from .operations import POWERS, Launch, StageMap, Tunable

OPERATIONS = ("linear_gelu", "linear_residual")


def cases() -> list[Case]:
    return [_case(operation, stage_map) for operation in OPERATIONS for stage_map in operations.stage_maps()]


def _case(operation: str, stage_map: StageMap) -> Case:
    """The expansion to four times the channels with its GELU, or the contraction with its residual."""
    channels, pixels = stage_map.channels, stage_map.pixels
    inputs, outputs = _widths(operation, channels)
    shapes = [(pixels, inputs), (outputs, inputs), (outputs,)]
    cost = costs.linear
    if operation == "linear_residual":
        shapes.append((pixels, outputs))
        cost = costs.linear_residual
    least = cost(pixels, inputs, outputs, stage_map.dtype.itemsize)
    return operations.tensors_case(operation, stage_map, shapes, least)


def _widths(operation: str, channels: int) -> tuple[int, int]:
    """The widths of what goes in and of what comes out."""
    return (channels, 4 * channels) if operation == "linear_gelu" else (4 * channels, channels)


def launches() -> dict[str, Launch]:
    return {
        "linear_gelu": operations.tensors_launch("linear_gelu", (20, 64), (128, 64), (128,)),
        "linear_residual": operations.tensors_launch("linear_residual", (20, 128), (64, 128), (64,), (20, 64)),
    }


def tunable() -> Tunable:
    space = {
        "rows": POWERS[5:9],
        "columns": POWERS[5:9],
        "depth": POWERS[4:8],
        "group": (4, 8, 16),
        "warps": (4, 8),
        "stages": (2, 3, 4, 5),
        "registers": (128, 255),
    }
    return Tunable(space, _fits, _problems)


def _problems() -> list[tuple[object, Case]]:
    found = []
    for stage_map in operations.stage_maps(["bfloat16", "float32"], [1]):
        for operation in OPERATIONS:
            widths = _widths(operation, stage_map.channels)
            key = configs.pointwise_bucket(stage_map.dtype.itemsize, stage_map.pixels, widths[1], widths)
            if operation == "linear_gelu":
                # It takes the tile of its bucket where it has none of its own.
                key = (*key, "gelu")
            found.append((key, _case(operation, stage_map)))
    return found


def _fits(key: tuple, tile: configs.ProductTile, shared: int) -> bool:
    accumulators = tile.rows * tile.columns // (32 * tile.warps)
    loaded = (tile.rows + tile.columns) * tile.depth * key[0] * tile.stages
    return 8 <= accumulators <= operations.MOST_REGISTERS and loaded <= shared
