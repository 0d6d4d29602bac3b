"""The cases for which kernels/dwconv_norm.py is compiled ahead of time."""

from typing import NamedTuple

import torch

from mg_fast.kernels import dwconv_norm
from mg_fast.kernels.configs import DWCONV_NORM, dwconv_norm_bucket, dwconv_norm_tile

from ..ahead_of_time_gate import DISTINCT, DTYPES, TWINS, Case

TABLE = DWCONV_NORM


class Convolution(
    NamedTuple("Convolution", [("architecture", int), ("dtype", str), ("side", int), ("channels", int)]), Case
):
    """The launcher of kernels/dwconv_norm.py on a square map."""

    def names(self) -> list[str]:
        return [f"dwconv_norm_fwd-sm_{self.architecture}-{self.dtype}_{self.side}x{self.side}x{self.channels}"]

    def launch(self, tile=None) -> None:
        def empty(*shape):
            return torch.empty(*shape, device="cuda", dtype=DTYPES[self.dtype])

        original = dwconv_norm.dwconv_norm_tile
        if tile is not None:
            dwconv_norm.dwconv_norm_tile = lambda *_: tile
        try:
            c = self.channels
            dwconv_norm.dwconv_norm_fwd(
                empty(1, self.side, self.side, c), empty(49, c), empty(c), empty(c), empty(c), 1e-6
            )
        finally:
            dwconv_norm.dwconv_norm_tile = original

    def buckets(self) -> list:
        return [dwconv_norm_bucket(self.channels, self.strides())]

    def strides(self) -> tuple[int, int, int]:
        """Strides of pictures, rows and columns."""
        return self.side**2 * self.channels, self.side * self.channels, self.channels

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        # Loads of every chunk's bias, of both norm vectors, of a column's taps, and of the pixels under its rows, with
        # 4 channels for each thread.
        tile = dwconv_norm_tile(self.architecture, self.channels, self.strides())
        expected = -(-self.channels // tile.channels) * (3 + 7 + tile.rows + 6)
        if self.buckets()[0][1] and found["global loads"] != expected:
            return [f"narrow loads: {found['global loads']} where {expected} would do"]
        return []


# The stages of ConvNeXt-L at 768 pixels. Those at 1536 use the same kernels, because Triton only knows whether a side
# is a multiple of 16, and the last side is 24 at 768 and 48 at 1536.
LARGE = [(192, 192), (96, 384), (48, 768), (24, 1536)]
# The remaining buckets, and widths that allow no wide loads.
BUCKETS = [(24, 3072), (9, 131), (9, 3071)]


def cases() -> list[Convolution]:
    found = [Convolution(a, "bf16", *shape) for a in DISTINCT for shape in [*LARGE, *BUCKETS]]
    found += [Convolution(a, "bf16", 48, 768) for a in TWINS]
    # The first stage of the base model, in two chunks instead of three; and other dtypes.
    found.append(Convolution(90, "bf16", 192, 128))
    return found + [Convolution(a, dtype, 24, 1536) for a, dtype in ((80, "fp32"), (90, "fp32"), (90, "fp16"))]
