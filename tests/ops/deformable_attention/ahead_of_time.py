"""The cases for which the kernels of deformable attention are compiled ahead of time."""

from typing import NamedTuple

import torch

from mg_fast.kernels import deformable_attention, deformable_attention_backward, deformable_samples
from mg_fast.kernels.configs import DEFORMABLE_ATTENTION, deformable_attention_bucket

from ..ahead_of_time_gate import ARCHITECTURES, DTYPES, Case

TABLE = DEFORMABLE_ATTENTION
QUERIES, HEADS, BATCH = 300, 8, 2


class Shape(NamedTuple):
    """Sizes of one case: channels of a head, h and w of every level, and points."""

    channels: int
    sides: tuple[int, ...]
    points: int


LEVELS = (100, 134, 50, 67, 25, 34, 13, 17)
SHAPES = {
    # Deformable DETR, MM-Interleaved's UNet, its adapter's injector and extractor, and RF-DETR.
    "32": Shape(32, LEVELS, 4),
    "64": Shape(64, (64, 64, 32, 32, 16, 16, 8, 8), 8),
    "three_levels": Shape(32, (32, 32, 16, 16, 8, 8), 4),
    "one_level": Shape(32, (16, 16), 4),
    "two_points": Shape(16, (24, 24), 2),
    # The widest heads, the most levels, and heads that allow no wide loads.
    "128": Shape(128, LEVELS, 4),
    "256": Shape(256, LEVELS, 3),
    "eight_levels": Shape(64, (8, 8) * 8, 8),
    "odd5": Shape(5, LEVELS, 4),
    "odd33": Shape(33, LEVELS, 4),
    "odd250": Shape(250, LEVELS, 4),
}


class Sampling(
    NamedTuple("Sampling", [("launcher", str), ("architecture", int), ("dtype", str), ("shape", str)]), Case
):
    """A launcher of kernels/deformable_attention.py or of deformable_attention_backward.py on one of SHAPES."""

    def names(self) -> list[str]:
        name = f"{self.launcher}-sm_{self.architecture}-{self.dtype}_{self.shape}"
        if self.launcher == "sum_rows_bwd":
            # The launch before it computes the other two gradients.
            return [f"deformable_attention_bwd-sm_{self.architecture}-{self.dtype}_{self.shape}_sorting", name]
        return [name]

    def launch(self, tile=None) -> None:
        channels, sides, points = SHAPES[self.shape]
        levels, pixels = len(sides) // 2, sum(h * w for h, w in zip(sides[::2], sides[1::2]))
        dtype = DTYPES[self.dtype]

        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        original = deformable_samples.deformable_attention_tile
        if tile is not None:
            deformable_samples.deformable_attention_tile = lambda *_: tile
        try:
            value = empty(BATCH, pixels, HEADS, channels, dtype=dtype)
            locations = empty(BATCH, QUERIES, HEADS, levels, points, 2)
            weights = empty(BATCH, QUERIES, HEADS, levels, points, dtype=dtype)
            grad = empty(BATCH, QUERIES, HEADS * channels, dtype=dtype)
            if self.launcher == "deformable_attention_fwd":
                deformable_attention.deformable_attention_fwd(value, sides, locations, weights)
            elif self.launcher == "deformable_attention_bwd":
                deformable_attention_backward.deformable_attention_bwd(
                    grad, value, sides, locations, weights, [True] * 3
                )
            else:
                order = empty(4 * weights.numel(), dtype=torch.int64)
                ends = empty(BATCH * pixels * HEADS + 1, dtype=torch.int64)
                deformable_attention_backward.deformable_attention_bwd(
                    grad, value, sides, locations, weights, [False, True, True]
                )
                deformable_attention_backward.sum_rows_bwd(grad, sides, locations, weights, order, ends, dtype)
        finally:
            deformable_samples.deformable_attention_tile = original

    def buckets(self) -> list:
        stage = "forward" if self.launcher == "deformable_attention_fwd" else "backward"
        channels, sides, _ = SHAPES[self.shape]
        pixels = sum(h * w for h, w in zip(sides[::2], sides[1::2]))
        strides = pixels * HEADS * channels, HEADS * channels, channels
        return [deformable_attention_bucket(stage, DTYPES[self.dtype].itemsize, channels, strides)]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        if self.shape.startswith("odd") or self.launcher != "deformable_attention_fwd":
            return []
        # A location and a weight take three narrow loads, and a sample four wide ones for each vector of a thread.
        narrow = found["global loads"] - found["of 128 bits"]
        if not narrow or 3 * found["of 128 bits"] < 4 * narrow:
            return [f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits"]
        return []


def cases() -> list[Sampling]:
    def add(launchers, architectures, dtypes, shapes):
        found.extend(
            Sampling(*c)
            for a in architectures
            for c in ((x, a, d, s) for d in dtypes for s in shapes for x in launchers)
        )

    found: list[Sampling] = []
    # ptxas gives these kernels other registers on sm_89 than on sm_86, so they are compiled for both.
    every = ("deformable_attention_fwd", "deformable_attention_bwd", "sum_rows_bwd")
    add(every, ARCHITECTURES, ["bf16", "fp32"], ["32"])
    add(every[:2], ARCHITECTURES, ["bf16"], ["64"])
    add(every[:2], ARCHITECTURES, ["bf16", "fp32"], ["odd33"])
    # Other sizes and dtypes differ little from one architecture to the next. Whatever the published models launch is
    # compiled for one, which test_aot_published.py checks.
    add(every, (90,), ["fp16"], ["32"])
    add(every, (90,), DTYPES, ["three_levels", "one_level"])
    add(every[:2], (90,), ["bf16"], ["two_points", "128", "256", "eight_levels", "odd5", "odd250"])
    add(every[:2], (90,), ["fp32"], ["64", "odd250"])
    add(every[2:], (90,), ["fp32"], ["256", "odd5"])
    return found
