"""A picture's preprocessing alone: a camera's picture to both resolutions."""

from dataclasses import dataclass, replace

import torch

from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.ops.torch import dual_resize as torch_form

from ..costs import floors
from ..registry import Case
from .operations import POWERS, Launch, Tunable, forms
from .settings import LR, PICTURE, SETTINGS, Setting, picture_pixels


@dataclass
class ResizeInputs:
    device: str
    pixels: torch.Tensor


def cases() -> list[Case]:
    return [_case(setting) for setting in SETTINGS]


def _case(setting: Setting) -> Case:
    def resize(pixels: torch.Tensor, backend: str) -> list[torch.Tensor]:
        return list(ops.dual_resize(pixels, **setting.resize, backend=backend))

    def exact(inputs: ResizeInputs) -> list[torch.Tensor]:
        return [pixels.double() for pixels in resize(inputs.pixels, "reference")]

    # Pictures are resized to float32, in whichever dtype the towers run.
    return Case(
        f"dual_resize/{setting.name}-float32",
        lambda device: ResizeInputs(device, picture_pixels(device)),
        forms("dual_resize", lambda inputs, backend: lambda: resize(inputs.pixels, backend)),
        exact,
        least=floors.preprocess(setting.side, LR, setting.views),
        stage="preprocess",
    )


def launches() -> dict[str, Launch]:
    return {
        # One call makes both launches of a resize. It computes with integers, so the dtype does not matter.
        "dual_resize": Launch(
            lambda dtype: torch.randint(0, 256, (9, 13, 3), dtype=torch.uint8),
            lambda picture, backend: list(ops.dual_resize(picture, 16, 6, grid=2, global_view=True, backend=backend)),
        )
    }


def tunable() -> Tunable:
    space = {"rows": POWERS[:5], "columns": POWERS[5:10], "warps": POWERS[:4]}
    # The library's form brings its tables to the GPU in every call, which cannot be captured.
    return Tunable(space, _fits, _problems, prepare=_keep_tables, library_graphed=False)


def _keep_tables() -> None:
    for setting in SETTINGS:
        torch_form.view_taps(setting.side, LR, setting.grid, setting.views > setting.grid**2)


def _problems() -> list[tuple[object, Case]]:
    return [(key, replace(_case(setting), make=_random_pixels)) for setting in SETTINGS for key in ("columns", "rows")]


def _random_pixels(device: str) -> ResizeInputs:
    torch.manual_seed(0)
    return ResizeInputs(device, torch.randint(0, 256, (*PICTURE[::-1], 3), dtype=torch.uint8, device=device))


def _fits(key: str, tile: configs.ResizeTile, shared: int) -> bool:
    return 1 <= tile.rows * tile.columns // (32 * tile.warps) <= 32
