"""The interpreted resizing kernel has Pillow's own bits, whatever the layout and wherever the picture ends."""

import numpy as np
import pytest
import torch

from mg_fast import ops
from mg_fast.kernels import dual_resize as kernels
from mg_fast.kernels.configs import ResizeTile
from mg_fast.ops.torch import dual_resize as resizing
from tests.ops.dual_resize.test_dual_resize import assert_as_pillow, assert_same, by_pillow, noise

CASES = {
    "one pixel": (1, 1, 3, 2, 1, True),
    "one row": (20, 1, 24, 5, 1, True),
    "one column": (1, 20, 24, 5, 1, True),
    "smaller": (40, 27, 11, 5, 1, True),
    "larger": (5, 7, 19, 8, 1, True),
    "HD": (30, 21, 16, 5, 2, True),
    "three tiles a side": (14, 21, 18, 4, 3, True),
    "cropped": (25, 14, 9, 4, 2, False),
    "tall, cropped": (5, 60, 7, 4, 1, False),
    "its own size": (12, 12, 12, 6, 1, True),
    "views larger than the picture": (9, 8, 6, 10, 2, True),
    "wider than a tile": (9, 4, 140, 5, 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_pillows_bits(case):
    width, height, *rest = CASES[case]
    assert_as_pillow(noise(width, height), *rest, backend="triton")


@pytest.mark.parametrize("tile", [ResizeTile(1, 4, 4), ResizeTile(8, 16, 4), ResizeTile(64, 64, 4)], ids=str)
def test_any_tile(tile, monkeypatch):
    """Any tile gives the same bits: one that nothing divides, and one that is larger than everything."""
    monkeypatch.setattr(kernels, "dual_resize_tile", lambda *_: tile)
    assert_as_pillow(noise(13, 9), 10, 3, 2, backend="triton")


@pytest.mark.parametrize("colour", [0, 255])
def test_flat_pictures_stay_flat(colour):
    picture = torch.full((11, 23, 3), colour, dtype=torch.uint8)
    hr, views = ops.dual_resize(picture, 13, 5, pad=False, backend="triton")
    level = torch.from_numpy(resizing.level_tables())[:, colour, None, None]
    assert torch.equal(hr, level.expand_as(hr)) and torch.allclose(views, level.expand_as(views), atol=1e-6)


def test_strides():
    picture = noise(15, 12)
    expected = by_pillow(picture, 10, 4, 1, True)
    around = torch.cat([255 - picture, picture, 255 - picture], dim=1)
    for same in (
        picture.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        picture.transpose(0, 1).contiguous().transpose(0, 1),
        around[:, 15:30],
        torch.cat([255 - picture, picture], dim=2)[..., 3:],
        picture.repeat_interleave(2, 0)[::2],
        picture[None].expand(2, -1, -1, -1)[1],
    ):
        assert_same(ops.dual_resize(same, 10, 4, backend="triton"), expected)
    grey = picture[..., :1].expand(-1, -1, 3)
    assert_as_pillow(grey, 10, 4, backend="triton")


def test_operator():
    sample = (noise(9, 7), 8, 3, 2, True, True, "triton")
    torch.library.opcheck(ops.resize_picture, sample)
    compiled = torch.compile(lambda p: ops.dual_resize(p, 8, 3, backend="triton"), backend="aot_eager", fullgraph=True)
    assert_same(compiled(noise(9, 7)), by_pillow(noise(9, 7), 8, 3, 1, True))


def test_tables_are_made_for_the_size_that_is_asked_for():
    """Sizes that follow each other in one process get tables of their own, although tables are kept."""
    generator = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(3):
            assert_as_pillow(noise(*(int(n) for n in generator.integers(3, 12, 2))), 6, 4, backend="triton")
        generator = np.random.default_rng(0)
