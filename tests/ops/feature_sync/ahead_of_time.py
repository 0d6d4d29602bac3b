"""The cases for which kernels/feature_sync.py is compiled ahead of time."""

import math
from typing import NamedTuple

import torch

from mg_fast.kernels import feature_sync
from mg_fast.kernels.configs import FEATURE_SYNC, feature_sync_bucket, feature_sync_tile

from ..ahead_of_time_gate import DISTINCT, DTYPES, TWINS, Case

TABLE = FEATURE_SYNC
HEADS, POINTS = 16, 8


class Synchronizer(
    NamedTuple(
        "Synchronizer",
        [
            ("architecture", int),
            ("dtype", str),
            ("queries", int),
            ("pictures", int),
            ("sides", tuple),
            ("channels", int),
        ],
    ),
    Case,
):
    """The launcher of kernels/feature_sync.py for one row of queries, with 16 heads, 8 points and square maps.

    The dtype is that of the values, beside queries in float32; or with "all_" in front, that of a whole model, which
    also has the layouts of MM-Interleaved.
    """

    alone = {"*_q1_*": "the heads of one query are fewer programs than a GPU has multiprocessors"}

    def names(self) -> list[str]:
        levels = "-".join(map(str, self.sides))
        return [
            f"feature_sync_fwd-sm_{self.architecture}-{self.dtype}_q{self.queries}_n{self.pictures}_{levels}"
            f"_d{self.channels}"
        ]

    def launch(self, tile=None) -> None:
        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        original = feature_sync.feature_sync_tile
        if tile is not None:
            feature_sync.feature_sync_tile = lambda *_: tile
        try:
            width, model, unet = (
                HEADS * POINTS * (2 + len(self.sides)),
                self.dtype.startswith("all_"),
                self.sides == UNET,
            )
            dtype = self._dtype() if model else torch.float32
            # In the model a token stands for the middle of every picture, and a pixel of the UNet has a place of its
            # own and sees the same picture as the others.
            feature_sync.feature_sync_fwd(
                empty(1, self.pictures, self._pixels(), HEADS, self.channels, dtype=self._dtype()),
                empty(1, self.queries, width, dtype=dtype),
                empty(50, width, dtype=dtype),
                empty(1, 1 if model and unet else self.queries, self.pictures, dtype=torch.int64),
                empty(1, 1 if model and not unet else self.queries, 2),
                [(side, side) for side in self.sides],
                math.isqrt(self.queries) if model and unet else 16,
                empty(HEADS * self.channels, dtype=self._dtype()),
            )
        finally:
            feature_sync.feature_sync_tile = original

    def buckets(self) -> list:
        return [feature_sync_bucket(self._dtype().itemsize, self.queries, self.channels, self._strides())]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        [(size, _, wide)] = self.buckets()
        if not wide:
            return []
        # Every pixel that a thread reads, of four for each sample, takes as few loads as it can.
        tile = feature_sync_tile(
            self.architecture, size, self.queries, self.pictures, POINTS, self.channels, self._strides()
        )
        numbers = tile.queries * tile.pictures * tile.points * tile.channels * tile.times // (32 * tile.warps)
        expected = 4 * len(self.sides) * max(1, numbers * size // 16)
        if found["of 128 bits"] < expected:
            return [f"narrow loads: {found['of 128 bits']} of 128 bits where {expected} would do"]
        return []

    def _dtype(self) -> torch.dtype:
        return DTYPES[self.dtype.removeprefix("all_")]

    def _pixels(self) -> int:
        return sum(side * side for side in self.sides)

    def _strides(self) -> tuple[int, int, int, int]:
        """Strides of rows, pictures, pixels and heads."""
        pixel = HEADS * self.channels
        return self.pictures * self._pixels() * pixel, self._pixels() * pixel, pixel, self.channels


# The maps of the language model and of the UNet.
LANGUAGE, UNET = (32, 16, 8), (64, 32, 16, 8)


def cases() -> list[Synchronizer]:
    found = []
    for architecture in DISTINCT:
        for dtype in ("bf16", "fp32"):
            found += [
                # One generated token, a small and the largest block of the UNet, and widths that allow no wide loads.
                Synchronizer(architecture, dtype, 1, 4, LANGUAGE, 64),
                Synchronizer(architecture, dtype, 64, 1, UNET, 64),
                Synchronizer(architecture, dtype, 4096, 1, UNET, 64),
                Synchronizer(architecture, dtype, 1, 4, LANGUAGE, 37),
                Synchronizer(architecture, dtype, 2048, 4, LANGUAGE, 37),
            ]
    found += [Synchronizer(a, "bf16", *shape) for a in TWINS for shape in ((1, 4, LANGUAGE, 64), (4096, 1, UNET, 64))]
    # Other numbers of pictures, a long prompt, and float16.
    found += [Synchronizer(90, "bf16", 1, pictures, LANGUAGE, 64) for pictures in (1, 8, 16, 49)]
    found += [Synchronizer(90, "bf16", 2048, 8, LANGUAGE, 64), Synchronizer(90, "bf16", 512, 4, LANGUAGE, 64)]
    found += [Synchronizer(90, "fp16", 1, 4, LANGUAGE, 64), Synchronizer(90, "fp16", 4096, 1, UNET, 64)]
    # Whatever MM-Interleaved launches, which test_aot_published.py holds against the table: a token, prompts, and the
    # blocks of the UNet.
    published = [*((1, n, LANGUAGE) for n in (1, 4, 8)), *((q, n, LANGUAGE) for q in (512, 2048) for n in (4, 8))]
    published += [(side**2, 1, UNET) for side in UNET]
    return found + [Synchronizer(90, f"all_{dtype}", *size, 64) for dtype in DTYPES for size in published]
