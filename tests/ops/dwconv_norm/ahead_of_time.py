"""The cases for which kernels/dwconv_norm.py is compiled ahead of time."""

import unittest.mock
from typing import NamedTuple

import torch

from mg_fast.kernels import configs, dwconv_norm
from mg_fast.kernels.configs import dwconv_norm_bucket, dwconv_norm_tile

from ..ahead_of_time_gate import DISTINCT, DTYPES, TWINS, Case

# The keys of the two tables are different.
TABLES = configs.DWCONV_NORM, configs.PIXEL_NORM
TABLE = {
    architecture: {key: tile for table in TABLES for key, tile in table.get(architecture, {}).items()}
    for architecture in sorted({a for table in TABLES for a in table}, key=str)
}


class Convolution(
    NamedTuple("Convolution", [("architecture", int), ("dtype", str), ("side", int), ("channels", int)]), Case
):
    """The launcher of kernels/dwconv_norm.py on a square map."""

    alone = {
        "*x3072": "a pixel of OpenCLIP's xxlarge takes all registers, and only float32 maps run in one launch",
        "*x3071": "no published model has channels that allow no wide loads",
    }

    def in_bands(self) -> bool:
        return configs.dwconv_in_bands(DTYPES[self.dtype].itemsize, self.channels, self.strides())

    def names(self) -> list[str]:
        kernels = ["dwconv_bands_fwd", "pixel_norm_fwd"] if self.in_bands() else ["dwconv_norm_fwd"]
        return [
            f"{kernel}-sm_{self.architecture}-{self.dtype}_{self.side}x{self.side}x{self.channels}"
            for kernel in kernels
        ]

    def launch(self, tile=None) -> None:
        def empty(*shape):
            return torch.empty(*shape, device="cuda", dtype=DTYPES[self.dtype])

        c = self.channels
        tensors = empty(1, self.side, self.side, c), empty(49, c), empty(c), empty(c), empty(c)
        if tile is None:
            dwconv_norm.dwconv_norm_fwd(*tensors, 1e-6)
        elif self.in_bands():
            with unittest.mock.patch.object(dwconv_norm, "dwconv_bands_tile", lambda *_: tile):
                dwconv_norm.dwconv_norm_fwd(*tensors, 1e-6)
        else:
            with unittest.mock.patch.object(dwconv_norm, "dwconv_norm_tile", lambda *_: tile):
                dwconv_norm.dwconv_norm_fwd(*tensors, 1e-6)

    def buckets(self) -> list:
        if self.in_bands():
            return [configs.dwconv_bands_bucket(self.channels), configs.pixel_norm_bucket(self.channels)]
        return [dwconv_norm_bucket(self.channels, self.strides())]

    def strides(self) -> tuple[int, int, int]:
        """Strides of pictures, rows and columns."""
        return self.side**2 * self.channels, self.side * self.channels, self.channels

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        expected = self._loads(name)
        wrong = []
        if expected is not None and found["global loads"] != expected:
            wrong.append(f"narrow loads: {found['global loads']} where {expected} would do")
        if name.startswith("dwconv_bands") and found["shared"]:
            wrong.append(
                f"operands pass through {found['shared']} bytes of shared memory, they should stay in registers"
            )
        return wrong

    def _loads(self, name: str) -> int | None:
        """The loads that a thread needs; None where loads are narrow."""
        if name.startswith("dwconv_bands"):
            # Four for each row of the windows, sixteen for the bands, and one for the bias.
            return 4 * (configs.dwconv_bands_tile(self.architecture, self.channels).rows + 6) + 17
        if name.startswith("pixel_norm"):
            # For each chunk of 8 channels both norm vectors, and a pixel, which takes two loads in float32.
            tile = configs.pixel_norm_tile(self.architecture, self.channels)
            return -(-self.channels // tile.channels) * (4 if self.dtype == "fp16" else 3)
        if not self.buckets()[0][1]:
            return None
        # Loads of every chunk's bias, of both norm vectors, of a column's taps, and of the pixels under its rows, with
        # 4 channels for each thread.
        tile = dwconv_norm_tile(self.architecture, self.channels, self.strides())
        return -(-self.channels // tile.channels) * (3 + 7 + tile.rows + 6)


# The stages of ConvNeXt-L at 768 pixels, and the last one at 1536. The other stages use the same kernels there, because
# Triton only knows whether a side is a multiple of 16.
LARGE = [(192, 192), (96, 384), (48, 768), (24, 1536), (48, 1536)]
# The remaining bucket of wide loads, and widths that allow none.
WIDEST, NARROW = (24, 3072), [(9, 131), (9, 3071)]


def cases() -> list[Convolution]:
    found = [Convolution(a, dtype, *shape) for a in DISTINCT for dtype in DTYPES for shape in LARGE]
    found += [Convolution(a, dtype, *WIDEST) for a in DISTINCT for dtype in ("bf16", "fp32")]
    found += [Convolution(a, "bf16", *shape) for a in DISTINCT for shape in NARROW]
    found += [Convolution(a, dtype, 48, 768) for a in TWINS for dtype in ("bf16", "fp32")]
    # The first stage of the base model, in two chunks instead of three.
    return found + [Convolution(90, dtype, 192, 128) for dtype in ("bf16", "fp32")]
