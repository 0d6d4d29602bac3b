"""The cases for which kernels/pointwise.py is compiled ahead of time."""

from typing import NamedTuple

import torch

from mg_fast.kernels import pointwise
from mg_fast.kernels.configs import POINTWISE, pointwise_bucket

from ..ahead_of_time_gate import DISTINCT, DTYPES, TWINS, Case

TABLE = POINTWISE
# The most loads of one thread that are not of 128 bits, which are loads of the bias.
NARROW = 32


class Shape(NamedTuple):
    """Pixels and channels of a stage, whose block multiplies [M, C] to 4 C channels, and back."""

    pixels: int
    channels: int


SHAPES = {
    # ConvNeXt-L at 768 pixels, where the second products of the last two stages fill few programs; and those stages at
    # 1536 pixels.
    "stage0": Shape(192**2, 192),
    "stage1": Shape(96**2, 384),
    "stage2": Shape(48**2, 768),
    "stage3": Shape(24**2, 1536),
    "HD_stage2": Shape(96**2, 768),
    "HD_stage3": Shape(48**2, 1536),
    # The last stages of the base form at 384 pixels, where both products are small, and of xxlarge at 768.
    "base_stage3": Shape(12**2, 1024),
    "xxlarge_stage3": Shape(24**2, 3072),
    # Sizes that no block and no wide load divides.
    "odd": Shape(97, 37),
}


class Pointwise(
    NamedTuple("Pointwise", [("launcher", str), ("architecture", int), ("dtype", str), ("shape", str)]), Case
):
    """A launcher of kernels/pointwise.py on one of SHAPES."""

    alone = {
        "linear_residual_fwd-sm_80-*": "with Triton 3.8 it takes more registers than with 3.6",
        "*-sm_86-*": "the accumulators of its tile, which no GPU has tuned, take half of the registers",
        "*-sm_100-*": "the pipeline of its tile, which no GPU has tuned, fills the shared memory",
        "*-sm_120-*": "as on sm_86",
        "*fp32_odd": "no published model has such sizes",
    }

    def names(self) -> list[str]:
        return [f"{self.launcher}-sm_{self.architecture}-{self.dtype}_{self.shape}"]

    def _sizes(self) -> tuple[int, int, int]:
        m, c = SHAPES[self.shape]
        return (m, 4 * c, c) if self.launcher == "linear_gelu_fwd" else (m, c, 4 * c)

    def launch(self, tile=None) -> None:
        m, n, k = self._sizes()
        original = pointwise.pointwise_tile
        if tile is not None:
            pointwise.pointwise_tile = lambda *_, **__: tile
        try:
            shapes = [(m, k), (n, k), (n,), (m, n)][: 3 + (self.launcher == "linear_residual_fwd")]
            getattr(pointwise, self.launcher)(
                *(torch.empty(shape, device="cuda", dtype=DTYPES[self.dtype]) for shape in shapes)
            )
        finally:
            pointwise.pointwise_tile = original

    def buckets(self) -> list:
        m, n, k = self._sizes()
        bucket = pointwise_bucket(DTYPES[self.dtype].itemsize, m, n, [n, k])
        own = (*bucket, "gelu")
        gelu = self.launcher == "linear_gelu_fwd" and own in POINTWISE.get(self.architecture, {})
        return [own if gelu else bucket]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        wrong = []
        if self.shape != "odd" and (found["of 128 bits"] < 2 or found["global loads"] - found["of 128 bits"] > NARROW):
            wrong.append(f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits")
        # The products of float32 would not be exact in TF32.
        if (self.dtype == "fp32") != (found["tensor core"] == 0):
            wrong.append(f"{found['tensor core']} instructions on tensor cores for {self.dtype}")
        return wrong


def cases() -> list[Pointwise]:
    def add(dtypes, architectures, shapes):
        found.extend(Pointwise(x, a, d, s) for a in architectures for d in dtypes for s in shapes for x in launchers)

    found: list[Pointwise] = []
    launchers = ("linear_gelu_fwd", "linear_residual_fwd")
    # Whatever the published models launch, which test_aot_published.py holds against the table.
    add(DTYPES, DISTINCT, ["stage0", "stage1", "stage2", "stage3", "HD_stage2", "HD_stage3"])
    add(["bf16"], TWINS, ["stage2"])
    add(["bf16", "fp32"], DISTINCT, ["base_stage3", "odd"])
    # This case differs from those above only in K.
    add(["bf16"], [90], ["xxlarge_stage3"])
    return found
