"""The cases for which kernels/patch_mining.py, patch_mining_fields.py and patch_mining_coarse.py are compiled."""

from typing import NamedTuple

import torch

from mg_fast.kernels import coarse_tiles, patch_mining, patch_mining_coarse
from mg_fast.kernels.coarse_tiles import COARSE_MINING
from mg_fast.kernels.configs import PATCH_MINING, TRITON, patch_mining_bucket

from ..ahead_of_time_gate import DISTINCT, DTYPES, TWINS, Case

# The keys of the two tables differ. The second has tiles for some architectures only.
TABLE = PATCH_MINING | {a: PATCH_MINING.get(a, {}) | tiles for a, tiles in COARSE_MINING.items()}
LEVELS = 4
# The most loads of vectors by one thread of a program, for queries and statistics; pixels are not counted.
# Triton 3.8 takes a few more of them in backward kernels, beside as many wide loads of pixels as before, most of all
# for float32 queries over float16 maps on 12.0.
NARROW = 45 if TRITON >= (3, 8) else 40


class Shape(NamedTuple):
    """Sizes of one case.

    They are a grid of cells, queries along a view's side, pixels along a window's side, widths of the maps, and sides
    of the maps unless they halve.
    """

    grid: int
    queries: int
    side: int
    dims: tuple[int, ...]
    maps: tuple[int, ...] | None = None


SHAPES = {
    # The published models: one view of 768 pixels; four cells and a global view of 1536.
    "768": Shape(1, 24, 8, (192, 384, 768, 1536)),
    "HD": Shape(2, 24, 8, (192, 384, 768, 1536)),
    # Every other bucket of configs.py.
    **{f"side{side}": Shape(1, 4, side, (64, 96, 160)) for side in (4, 11, 16)},
    # A level of 3 / 4 of the finest, whose pixels are made tap by tap, in the bucket of the published models.
    "uneven": Shape(1, 4, 8, (64, 96, 160), (32, 24, 12)),
    # Widths that no block divides and that allow no wide loads.
    **{f"odd{side}": Shape(1, 4, side, (24, 37, 131)) for side in (4, 8, 11, 16)},
}


class Mining(NamedTuple("Mining", [("launcher", str), ("architecture", int), ("dtype", str), ("shape", str)]), Case):
    """A launcher of kernels/patch_mining.py on one of SHAPES."""

    alone = {
        "pool_windows_*_HD_*": "on other GPUs than those of 9.0 and 10.0 a window of HD takes 8 warps",
        "pool_windows_*_768": "as for windows of HD",
        "*_side11": "no published model has such windows, which fill the registers",
        "*_side16": "as for windows of 11 pixels",
        "*_odd16": "as for windows of 11 pixels",
    }

    def names(self) -> list[str]:
        name = f"{self.launcher}-sm_{self.architecture}-{self.dtype}_{self.shape}"
        return [f"{name}_cells", f"{name}_global"] if SHAPES[self.shape].grid > 1 else [name]

    def launch(self, tile=None) -> None:
        original = patch_mining.patch_mining_tile
        if tile is not None:
            patch_mining.patch_mining_tile = lambda *_, **__: tile
        try:
            self.call(patch_mining)
        finally:
            patch_mining.patch_mining_tile = original

    def call(self, module) -> None:
        """Calls the launcher, which is a function of one of the two modules of kernels."""
        shape, dtype = SHAPES[self.shape], DTYPES[self.dtype]
        views, tokens, fine = (
            shape.grid**2 + (shape.grid > 1),
            shape.queries**2,
            shape.grid * shape.queries * shape.side,
        )
        maps = shape.maps or [fine >> s for s in range(len(shape.dims))]
        # A model in float16 has its queries in float32.
        queries = torch.empty(
            2, views, tokens, sum(shape.dims), device="cuda", dtype=torch.float32 if self.dtype == "fp16" else dtype
        )
        pyramid = [torch.empty(2, n, n, dim, device="cuda", dtype=dtype) for n, dim in zip(maps, shape.dims)]
        if self.launcher.endswith("_fwd"):
            getattr(module, self.launcher)(queries, pyramid, shape.grid)
        else:
            statistics = torch.empty(2, views, tokens, 3, shape.side**2, device="cuda")
            getattr(module, self.launcher)(queries, queries, pyramid, statistics, shape.grid)

    def buckets(self) -> list:
        shape = SHAPES[self.shape]
        bucket = patch_mining_bucket(DTYPES[self.dtype].itemsize, shape.side, shape.dims)
        return [bucket, (*bucket, "reduced")] if shape.grid > 1 else [bucket]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        if self.shape not in ("768", "HD"):
            return []
        wrong = []
        # Pixels are loaded 16 bytes at once, at least once per pass and level. The few other loads are of vectors.
        if found["of 128 bits"] < 2 * LEVELS or found["global loads"] - found["of 128 bits"] > NARROW:
            wrong.append(f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits")
        # The products of float32 would not be exact in TF32.
        if (self.dtype == "fp32") != (found["tensor core"] == 0):
            wrong.append(f"{found['tensor core']} instructions on tensor cores for {self.dtype}")
        return wrong


class CoarseMining(Mining):
    """A launcher of kernels/patch_mining_coarse.py on one of SHAPES; the forward pass also goes over the pyramid."""

    def names(self) -> list[str]:
        first = [f"pixel_fields_fwd-sm_{self.architecture}-{self.dtype}_{self.shape}"]
        return first * (self.launcher == "pool_coarse_fwd") + super().names()

    def launch(self, tile=None) -> None:
        original = coarse_tiles.coarse_mining_tile
        if tile is not None:
            coarse_tiles.coarse_mining_tile = lambda *_, **__: tile
        try:
            self.call(patch_mining_coarse)
        finally:
            coarse_tiles.coarse_mining_tile = original

    def buckets(self) -> list:
        shape = SHAPES[self.shape]
        pixels = next(pixels for pixels in (16, 64, 256) if shape.side**2 <= pixels)
        if shape.dims[0] % 16:
            return ["fields", (pixels, "narrow")]
        return ["fields", pixels, *([(pixels, "reduced")] if shape.grid > 1 else [])]

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        if self.shape not in ("768", "HD"):
            return []
        wrong = []
        # A thread loads 16 bytes of a map at once. The other loads are of vectors and of the planes.
        if found["of 128 bits"] < LEVELS:
            wrong.append(f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits")
        return wrong


def cases() -> list[Mining]:
    def add(launchers, architectures, dtypes, shapes):
        found.extend(
            Mining(*c) for a in architectures for c in ((x, a, d, s) for d in dtypes for s in shapes for x in launchers)
        )

    found: list[Mining] = []
    both = ("pool_windows_fwd", "pool_windows_bwd")
    # Whatever the published models launch, which test_aot_published.py holds against the table.
    add(both, DISTINCT, DTYPES, ["768", "HD"])
    add(both, TWINS, ["bf16"], ["HD"])
    add(both[:1], TWINS, ["fp32"], ["HD"])
    add(both, (80, 90), ["bf16"], ["uneven"])
    buckets = [name for name in SHAPES if name not in ("768", "HD", "uneven")]
    # The other cases are compiled for the forward pass only, which as a rule needs more resources.
    add(both[:1], DISTINCT, ["bf16", "fp32"], buckets)
    add(both[1:], (80, 90), ["bf16"], buckets)

    def add_coarse(launchers, dtypes, shapes):
        found.extend(CoarseMining(x, 90, d, s) for d in dtypes for s in shapes for x in launchers)

    both = ("pool_coarse_fwd", "pool_coarse_bwd")
    add_coarse(both, ["bf16", "fp16"], ["768", "HD"])
    # The other buckets, each in one dtype.
    add_coarse(both, ["bf16"], ["side4", "side11", "odd8"])
    add_coarse(both[:1], ["fp16"], ["uneven", "side16", "odd4", "odd16"])
    return found
