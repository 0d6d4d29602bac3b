"""Sizes of the published models that several cases share, and opponents that any module has."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mg_fast.ops.backend import why_not

from ..registry import DTYPES, Call, NotHere

# of the stage maps of ConvNeXt-L, and blocks of each stage
DIMS = (192, 384, 768, 1536)
DEPTHS = (3, 3, 27, 3)
# CLIP ViT-L/14-336: patches along a side of a view, and their width
PATCHES = 24
WIDTH = 1024
# the side of a low-resolution view, and the size of a camera's picture
LR = 336
PICTURE = (4000, 3000)
# modes of torch.compile; None is its default. The others are CUDA graphs, and a search that takes minutes on a CPU
COMPILE_MODES = (None, "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Setting:
    """A published picture size: side in pixels, cells along a side, views (one more than cells with the global view)."""

    name: str
    side: int
    grid: int
    views: int


SETTINGS = (Setting("768", 768, 1, 1), Setting("1536-hd", 1536, 2, 5))
# batch 1 first, and what the published models run in
COMBINATIONS = tuple((setting, batch, dtype) for batch in (1, 8) for dtype in DTYPES for setting in SETTINGS)


def picture() -> Image.Image:
    """A photograph of a camera's size: one that comes with matplotlib, enlarged, as noise would be no picture for a
    resize.
    """
    from matplotlib import cbook

    with Image.open(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as photo:
        return photo.convert("RGB").resize(PICTURE, Image.Resampling.BICUBIC)


def devices_of(setting: Setting, batch: int, dtype: str) -> tuple[str, ...]:
    """Where a combination is measured unasked. A CPU takes minutes for the rest; its float16 is tens of times slower
    than bfloat16.
    """
    at_hand = batch == 1 and (dtype == "float32" or (dtype == "bfloat16" and setting.grid == 1))
    return ("cpu", "cuda") if at_hand else ("cuda",)


def compiled(build: Callable[[Any], Call], name: str) -> dict[str, Callable[[Any], Call]]:
    """A provider under torch.compile, by mode."""

    def under(mode: str | None) -> Callable[[Any], Call]:
        def make(inputs: Any) -> Call:
            if mode is not None and inputs.device == "cpu":
                raise NotHere(f"mode {mode} is for GPUs")
            call = torch.compile(build(inputs), mode=mode, dynamic=False)
            if mode is None:
                return call
            # its graphs write every result into the same memory
            return lambda: _clone(call())

        return make

    return {f"{name}, compiled" + (f" {mode}" if mode else ""): under(mode) for mode in COMPILE_MODES}


def own_graphs(providers: Iterable[str]) -> frozenset[str]:
    """Those that torch.compile replays as CUDA graphs."""
    return frozenset(name for name in providers if name.endswith(("reduce-overhead", "max-autotune")))


def _clone(outputs):
    return outputs.clone() if isinstance(outputs, torch.Tensor) else [output.clone() for output in outputs]


def require(operation: str, backend: str, device: str) -> None:
    """Raises NotHere where an operation's backend cannot run on a device."""
    if reason := why_not(operation, backend, torch.device(device)):
        raise NotHere(reason)
