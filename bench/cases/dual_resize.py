"""A picture's preprocessing alone: a camera's picture to both resolutions."""

from dataclasses import dataclass

import torch

from mg_fast import ops

from ..registry import Case, Cost
from .operations import Launch, forms
from .settings import LR, PICTURE, SETTINGS, Setting, picture


@dataclass
class Pixels:
    device: str
    pixels: torch.Tensor


def cases() -> list[Case]:
    return [_case(setting) for setting in SETTINGS]


def _case(setting: Setting) -> Case:
    sizes = dict(hr_size=setting.side, lr_size=LR, grid=setting.grid, global_view=setting.views > setting.grid**2)

    def make(device: str) -> Pixels:
        import numpy as np

        # a copy, as Pillow's own memory cannot be written to
        return Pixels(device, torch.from_numpy(np.array(picture())).to(device))

    def exact(inputs: Pixels) -> list[torch.Tensor]:
        return [pixels.double() for pixels in ops.dual_resize(inputs.pixels, **sizes, backend="reference")]

    providers = forms(
        "dual_resize", lambda inputs, backend: lambda: ops.dual_resize(inputs.pixels, **sizes, backend=backend)
    )
    least = Cost(0, 3 * PICTURE[0] * PICTURE[1] + 4 * 3 * (setting.side**2 + setting.views * LR**2))
    # float32 is what pictures are resized to, whatever the towers run in
    return Case(f"dual_resize/{setting.name}-float32", make, providers, exact, least=least)


def launches() -> dict[str, Launch]:
    return {
        # both launches of a resize; its numbers are whole, whatever the dtype
        "dual_resize": Launch(
            lambda dtype: torch.randint(0, 256, (9, 13, 3), dtype=torch.uint8),
            lambda picture, backend: list(ops.dual_resize(picture, 16, 6, grid=2, global_view=True, backend=backend)),
        )
    }
