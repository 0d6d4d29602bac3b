"""The cases for which kernels/dual_resize.py is compiled ahead of time."""

from typing import NamedTuple

import torch

from mg_fast.kernels import dual_resize
from mg_fast.kernels.configs import DUAL_RESIZE
from mg_fast.ops.torch import dual_resize as resizing

from ..ahead_of_time_gate import ARCHITECTURES, Case

TABLE = DUAL_RESIZE


class Shape(NamedTuple):
    """A picture's width and height, the sides of both resolutions, tiles along the canvas, and whether to pad."""

    width: int
    height: int
    hr_size: int = 768
    lr_size: int = 336
    grid: int = 1
    pad: bool = True


SHAPES = {
    # A photograph for the published models.
    "768": Shape(4000, 3000),
    "HD": Shape(4000, 3000, 1536, grid=2),
    "cropped": Shape(3000, 4000, pad=False),
    # Sizes of one, which Triton would turn into constants, and sizes that are not multiples of 16.
    "upscaled": Shape(1, 1, 97, 35, grid=3),
}


class Resizing(NamedTuple("Resizing", [("architecture", int), ("shape", str)]), Case):
    """Both launches for one of SHAPES."""

    def names(self) -> list[str]:
        return [f"resize_{stage}_fwd-sm_{self.architecture}-{self.shape}" for stage in ("columns", "rows")]

    def launch(self, tile=None) -> None:
        shape = SHAPES[self.shape]
        x, y = resizing.place(shape.width, shape.height, shape.hr_size, shape.pad)
        entries = shape.hr_size + shape.lr_size * (shape.grid + (shape.grid > 1))

        def taps(side):
            first, weights = resizing.bicubic_taps(side)
            return dual_resize.Taps(
                *(torch.empty(n, dtype=torch.int32, device="cuda") for n in (first.shape, weights.T.shape))
            )

        original = dual_resize.dual_resize_tile
        if tile is not None:
            dual_resize.dual_resize_tile = lambda *_: tile
        try:
            dual_resize.dual_resize_fwd(
                torch.empty(shape.height, shape.width, 3, dtype=torch.uint8, device="cuda"),
                taps(x),
                taps(y),
                *resizing.span(y),
                torch.empty(3, 256, device="cuda"),
                torch.empty(4, entries, dtype=torch.int32, device="cuda"),
                torch.empty(4, entries, device="cuda"),
                colour=resizing.PAD_COLOUR,
                lr_size=shape.lr_size,
                grid=shape.grid,
                global_view=shape.grid > 1,
            )
        finally:
            dual_resize.dual_resize_tile = original

    def buckets(self) -> list:
        return list(DUAL_RESIZE[None])


def cases() -> list[Resizing]:
    # The kernels are the same for every picture, so one architecture suffices to show it.
    return [Resizing(a, shape) for a in ARCHITECTURES for shape in SHAPES if shape == "768" or a == 90]
