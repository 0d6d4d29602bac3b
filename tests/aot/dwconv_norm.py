"""What kernels/dwconv_norm.py is compiled for ahead of time."""

from typing import NamedTuple

import torch

from mg_fast.kernels import dwconv_norm
from mg_fast.kernels.configs import DWCONV_NORM, dwconv_norm_bucket

from .gate import ARCHITECTURES, DTYPES, Case

TABLE = DWCONV_NORM


class Convolution(NamedTuple("Convolution", [("architecture", int), ("dtype", str), ("side", int), ("channels", int)]), Case):
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
            dwconv_norm.dwconv_norm_fwd(empty(1, self.side, self.side, c), empty(49, c), empty(c), empty(c), empty(c), 1e-6)
        finally:
            dwconv_norm.dwconv_norm_tile = original

    def buckets(self) -> list:
        return [dwconv_norm_bucket(self.channels, (self.side**2 * self.channels, self.side * self.channels, self.channels))]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        if self.channels % 16 == 0 and found["of 128 bits"] != found["global loads"]:
            return [f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits"]
        return []


# ConvNeXt-L's stages at 768 pixels. Those at 1536 are the same kernels: Triton knows of a side whether it is a multiple of 16, and the last
# is 24 at 768 and 48 at 1536
LARGE = [(192, 192), (96, 384), (48, 768), (24, 1536)]
# the last stage at 1536; the widest of xxlarge; base's; the buckets left; widths that no wide load fits, one in every bucket
ONCE = [(48, 1536), (24, 3072), (192, 128), (96, 256), (48, 512), (24, 1024)]
BUCKETS = [(24, 3072), (32, 96), (12, 6144), (9, 37), (9, 131), (9, 250), (9, 515), (9, 1001), (9, 3071), (9, 6143)]


def cases() -> list[Convolution]:
    found = [Convolution(a, "bf16", *shape) for a in ARCHITECTURES for shape in [*LARGE, *BUCKETS]]
    found += [Convolution(90, "bf16", *shape) for shape in ONCE if shape not in BUCKETS]
    return found + [Convolution(a, dtype, *shape) for a in (80, 90) for dtype in ("fp32", "fp16") for shape in ((192, 192), (24, 1536))]
