"""Random pictures through the interpreted resizing kernel have Pillow's own bits."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mg_fast.kernels import dual_resize as kernels
from mg_fast.kernels.configs import ResizeTile
from tests.fuzzing import fuzz
from tests.ops.dual_resize.test_dual_resize import assert_as_pillow, noise

LAYOUTS = {
    "contiguous": lambda p: p,
    "CHW": lambda p: p.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "turned": lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
    "within": lambda p: torch.cat([255 - p, p, 255 - p], 1)[:, p.shape[1] : 2 * p.shape[1]],
    "every other": lambda p: p.repeat_interleave(2, 1)[:, ::2],
}


class Case(NamedTuple):
    """One draw, with the pixels given by the seed."""

    width: int
    height: int
    hr_size: int
    lr_size: int
    grid: int
    pad: bool
    layout: str
    tile: ResizeTile
    seed: int


# One program is fastest. Where there are several, they end inside the picture.
TILES = [ResizeTile(32, 32, 4)] * 7 + [ResizeTile(8, 16, 4)]
# The global view of several tiles takes as long as three other views, so such grids are rare.
GRIDS = [1] * 14 + [2, 3]
CASES = st.builds(
    Case,
    # Every tap takes equally long, so shrinking to a fourth tests as much as shrinking to a sixth.
    width=st.integers(1, 20),
    height=st.integers(1, 20),
    hr_size=st.integers(5, 24),
    lr_size=st.integers(1, 10),
    grid=st.sampled_from(GRIDS),
    pad=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    tile=st.sampled_from(TILES),
    seed=st.integers(0, 2**16),
)


@pytest.fixture(autouse=True)
def tiles_of_configs_again(monkeypatch):
    monkeypatch.setattr(kernels, "dual_resize_tile", kernels.dual_resize_tile)


@fuzz(250)
@given(CASES)
def test_fuzz(case):
    long, short = max(case.width, case.height), min(case.width, case.height)
    # Thinner pictures are refused.
    assume(not case.pad or short * case.hr_size >= long)
    picture = LAYOUTS[case.layout](noise(case.width, case.height, case.seed))
    kernels.dual_resize_tile = lambda *_: case.tile
    assert_as_pillow(picture, case.hr_size, case.lr_size, case.grid, case.pad, backend="triton")
