"""Sizes of the published models that several cases share, and opponents that any module has."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_map

from mg_fast.ops.backend import why_not

from ..registry import DTYPES, Call, NotHere, Outputs, Provider

# Widths of the stage maps of ConvNeXt-L, and the number of blocks of each stage.
DIMS = (192, 384, 768, 1536)
DEPTHS = (3, 3, 27, 3)
# CLIP ViT-L/14-336: patches along a side of a view, their width, and the layers, of which the last but one is read.
PATCHES = 24
WIDTH = 1024
LAYERS = 24
# The side of a low-resolution view, and the size of a camera's picture.
LR = 336
PICTURE = (4000, 3000)
# Modes of torch.compile; None is its default. The other two replay CUDA graphs, and their search would take minutes on
# a CPU.
COMPILE_MODES = (None, "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Setting:
    """A published picture size: side in pixels, cells along a side, views (one more than cells with a global view)."""

    name: str
    side: int
    grid: int
    views: int

    @property
    def resize(self) -> dict[str, int | bool]:
        """The arguments of `ops.dual_resize`."""
        global_view = self.views > self.grid**2
        return {"hr_size": self.side, "lr_size": LR, "grid": self.grid, "global_view": global_view}


SETTINGS = (Setting("768", 768, 1, 1), Setting("1536-hd", 1536, 2, 5))
# Batch 1, which the published models run in, comes first.
COMBINATIONS = tuple((setting, batch, dtype) for batch in (1, 8) for dtype in DTYPES for setting in SETTINGS)


def picture() -> Image.Image:
    """A photograph of a camera's size: one that comes with matplotlib, enlarged.

    Noise would be no fair picture for a resize.
    """
    from matplotlib import cbook

    with Image.open(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as photo:
        return photo.convert("RGB").resize(PICTURE, Image.Resampling.BICUBIC)


def picture_pixels(device: str) -> torch.Tensor:
    """The photograph as uint8 [height, width, 3]."""
    # Pillow's own memory cannot be written to, so the pixels are copied.
    return torch.from_numpy(np.array(picture())).to(device)


def devices_of(setting: Setting, batch: int, dtype: str) -> tuple[str, ...]:
    """The devices on which a combination is measured even if no case is named.

    A CPU takes minutes for the rest, and its float16 is tens of times slower than bfloat16.
    """
    at_hand = batch == 1 and (dtype == "float32" or (dtype == "bfloat16" and setting.grid == 1))
    return ("cpu", "cuda") if at_hand else ("cuda",)


def compiled(build: Callable[[Any], Call], name: str) -> dict[str, Provider]:
    """A provider under torch.compile, by mode."""

    def under(mode: str | None, inputs: Any) -> Call:
        if mode is not None and inputs.device == "cpu":
            raise NotHere(f"mode {mode} is for GPUs")
        call = torch.compile(build(inputs), mode=mode, dynamic=False)
        # The graphs of these modes write every result into the same memory.
        return call if mode is None else lambda: tree_map(torch.clone, call())

    providers = {}
    for mode in COMPILE_MODES:
        title = f"{name}, compiled" + (f" {mode}" if mode else "")
        providers[title] = Provider(partial(under, mode), own_graphs=mode is not None)
    return providers


def within(context: Callable[[], AbstractContextManager], build: Callable[[Any], Call], inputs: Any) -> Call:
    """A provider's call within a context."""
    call = build(inputs)

    def inside() -> Outputs:
        with context():
            return call()

    return inside


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the block torch's algorithms are deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def require(operation: str, backend: str, device: str) -> None:
    """Raises NotHere where an operation's backend cannot run on a device."""
    if reason := why_not(operation, backend, torch.device(device)):
        raise NotHere(reason)
