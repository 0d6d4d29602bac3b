"""FLOP and bytes by formula, against torch's FlopCounterMode, the count at the dispatcher, and a kernel's own loads."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.costs import peak_memory
from bench.costs.mining import Sizes, mining_floor, reference_mining, torch_mining, triton_mining
from bench.costs.tower import FORMS, Tower, tower_cost, tower_floor
from bench.counting import Count
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.modules import convnext_channels_last as convnext
from mg_fast.ops import reference
from mg_fast.ops.operation import OPERATIONS, product_flop
from mg_fast.ops.torch import patch_mining as torch_form
from mg_fast.ops.torch.pointwise import EXTRA
from tests.paths import ROOT

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVING = ((48, 6), (24, 10), (12, 14), (6, 18))
SMALL = {
    "standard": dict(side=3, dim=12, levels=((24, 6), (12, 10), (6, 14))),
    "two pictures": dict(batch=2, side=3, dim=12, levels=((24, 6), (12, 10))),
    "maps that do not halve": dict(side=3, dim=12, levels=((27, 6), (13, 10), (6, 14))),
    "HD": dict(grid=2, views=5, side=3, dim=12, levels=HALVING),
    "HD, two pictures": dict(batch=2, grid=2, views=5, side=3, dim=12, levels=HALVING),
    "HD without the global view": dict(batch=2, grid=2, views=4, side=3, dim=12, levels=HALVING),
    "three cells a side": dict(grid=3, views=10, side=2, dim=12, levels=((24, 6), (12, 10))),
}
published = pytest.mark.parametrize("side", [768, 1536])
small = pytest.mark.parametrize("case", SMALL)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(sizes, device):
    def empty(*shape):
        return torch.zeros(shape, dtype=sizes.dtype, device=device)

    def projection(width):
        return reference.Projection(empty(width), empty(width), empty(sizes.dim, width), empty(sizes.dim))

    queries = empty(sizes.batch, sizes.views, sizes.side**2, sizes.dim)
    pyramid = [empty(sizes.batch, n, n, c) for n, c in sizes.levels]
    return queries, pyramid, *(projection(width) for width in (sizes.dim, sizes.channels, sizes.channels))


def count(function, sizes, device):
    """FLOP and bytes on a device, without the tables of the PyTorch form; on "cuda" the tensors are fake."""
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext(), torch.no_grad():
        given = inputs(sizes, device)
        if device != "cuda":
            # The first call makes real tables; their products are no part of the second call.
            function(*given, grid=sizes.grid)
        with FlopCounterMode(display=False) as flop, Count(device) as counter:
            function(*given, grid=sizes.grid)
    return flop.get_total_flops(), counter


@dtypes
@published
def test_reference_at_the_published_sizes(side, dtype):
    """Counted on fake tensors of a GPU."""
    sizes = Sizes.of_picture(side, dtype)
    flop, counter = count(reference.patch_mining, sizes, "cuda")
    assert reference_mining(sizes) == replace(counter.total, flop=flop)


@dtypes
@small
def test_reference_at_any_size(case, dtype):
    sizes = Sizes(dtype, **SMALL[case])
    flop, counter = count(reference.patch_mining, sizes, "meta")
    assert reference_mining(sizes) == replace(counter.total, flop=flop)
    # The FLOP are the same with numbers on a CPU.
    assert count(reference.patch_mining, sizes, "cpu")[0] == flop


@pytest.mark.parametrize("together", [0, torch_form.TOGETHER])
def test_absorbed_on_a_cpu(together, monkeypatch):
    """A CPU computes the same products, whether row by row or for all pictures together."""
    monkeypatch.setattr(torch_form, "TOGETHER", together)
    sizes = Sizes(torch.float32, batch=16, side=6, dim=512, levels=((12, 128), (6, 128), (3, 256)))
    assert count(torch_form.patch_mining, sizes, "cpu")[0] == torch_mining(sizes).flop


@dtypes
@published
def test_absorbed_at_the_published_sizes(side, dtype):
    sizes = Sizes.of_picture(side, dtype)
    flop, counter = count(torch_form.patch_mining, sizes, "meta")
    cost = torch_mining(sizes)
    assert cost.flop == flop
    # The formula leaves out tensors of one number per pixel.
    assert 0.96 * counter.total.bytes < cost.bytes <= counter.total.bytes


@dtypes
@small
def test_absorbed_at_any_size(case, dtype):
    """The bytes that the formula leaves out do not grow with the channels, so the growth of the rest is exact."""
    sizes = Sizes(dtype, **SMALL[case])
    wide = replace(sizes, levels=tuple((n, 3 * c) for n, c in sizes.levels))
    (flop, counter), (wide_flop, wide_counter) = (count(torch_form.patch_mining, s, "meta") for s in (sizes, wide))
    cost, wide_cost = torch_mining(sizes), torch_mining(wide)
    assert (cost.flop, wide_cost.flop) == (flop, wide_flop)
    assert wide_cost.bytes_read - cost.bytes_read == wide_counter.total.bytes_read - counter.total.bytes_read
    assert (
        wide_cost.bytes_written - cost.bytes_written == wide_counter.total.bytes_written - counter.total.bytes_written
    )


@dtypes
@published
def test_triton_at_the_published_sizes(side, dtype):
    """The kernel counts as one operator."""
    pytest.importorskip("triton")
    sizes = Sizes.of_picture(side, dtype)
    gemms, counter = count(OPERATIONS["patch_mining"].forms["triton"], sizes, "meta")
    cost = triton_mining(sizes)
    assert (cost.bytes_read, cost.bytes_written) == (counter.total.bytes_read, counter.total.bytes_written)
    assert cost.flop == counter.total.flop
    if side == 768:
        # A window of 8 x 8 pixels takes the taps of the resizing matrix, or the taps of each pixel.
        product = {192: 64 + 64, 384: 64 * 36 + 64 + 36, 768: 64 * 16 + 64 + 16, 1536: 64 * 9 + 64 + 9}
        by_tap = {192: 64 + 64, 384: 64 + 64 * 4, 768: 64 + 64 * 4, 1536: 64 + 64 * 4}
        work = by_tap if dtype == torch.float32 else product
        assert cost.flop - gemms == 2 * 576 * sum(channels * each for channels, each in work.items())


INTERPRETED = """
import dataclasses, sys, torch
from triton.runtime import interpreter
from mg_fast.kernels.patch_mining import pool_windows_fwd
from tests.bench.test_formulas import ASKED, inputs

builder = interpreter.interpreter_builder
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
load, store, moved = builder.create_masked_load, builder.create_masked_store, [0, 0]

def count(which, pointers, mask):
    moved[which] += int(mask.data.sum()) * pointers.dtype.scalar.element_ty.primitive_bitwidth // 8

def counted_load(pointers, mask, *rest):
    count(0, pointers, mask)
    return load(pointers, mask, *rest)

def counted_store(pointers, value, mask, *rest):
    count(1, pointers, mask)
    return store(pointers, value, mask, *rest)

builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
for sizes in ASKED:
    moved[:] = 0, 0
    queries = torch.zeros(sizes.batch, sizes.views, sizes.side**2, sizes.channels, dtype=sizes.dtype)
    pool_windows_fwd(queries, inputs(sizes, "cpu")[1], sizes.grid)
    print(*moved)
"""
ASKED = [
    Sizes(torch.float32, batch=2, side=2, dim=12, levels=((8, 7), (4, 20))),
    Sizes(torch.bfloat16, side=2, dim=12, levels=((16, 70), (8, 6), (4, 10))),
    Sizes(torch.bfloat16, grid=2, views=5, side=1, dim=12, levels=((16, 6), (8, 10), (4, 14))),
]


def test_what_the_programs_ask_for():
    """The masks of the interpreted kernel's loads and stores count the same bytes."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for sizes, line in zip(ASKED, done.stdout.splitlines(), strict=True):
        counter = count(OPERATIONS["patch_mining"].forms["triton"], sizes, "meta")[1]
        around = counter.total + counter.costs["mg_fast.patch_mining.default"] * -1
        cost = triton_mining(sizes, cached=False)
        assert f"{cost.bytes_read - around.bytes_read} {cost.bytes_written - around.bytes_written}" == line


# ---- the high-resolution tower

TOWERS = {
    "two pictures": dict(batch=2, size=64, dims=(8, 12, 20, 36), depths=(2, 1, 3, 1)),
    "sides that do not halve": dict(size=100, dims=(7, 13, 29), depths=(1, 2, 1)),
    "one stage": dict(size=32, dims=(8,), depths=(2,)),
}
towers = pytest.mark.parametrize("side", [768, 1536])
needs_cudnn = pytest.mark.skipif(
    not torch.backends.cudnn.is_available(), reason="takes a torch that is built for CUDA: no GPU"
)
# torch asks the GPU, which is not here, whether its convolutions take bfloat16.
sixteen = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def as_packed(stages, dtype, form):
    """A tower packed for the library has wider products in 16 bits."""
    return convnext.widened(stages) if dtype.itemsize == 2 and form != "triton" else stages


def count_tower(tower):
    """FLOP and bytes of the PyTorch form on fake tensors of a GPU; on the meta device strides would be others."""
    like = {"dtype": tower.dtype, "device": "cuda"}
    with FakeTensorMode(), torch.no_grad():
        stem, stages = convnext.empty_tower(tower.dims, tower.depths, **like)
        stages = as_packed(stages, tower.dtype, "torch")
        pixels = torch.empty(tower.batch, 3, tower.size, tower.size, **like)
        with FlopCounterMode(display=False) as flop, Count("cuda") as counter:
            convnext.run_tower(stem, stages, pixels, "torch")
    return replace(counter.total, flop=flop.get_total_flops())


@needs_cudnn
@sixteen
@towers
def test_tower_at_the_published_sizes(side, dtype):
    tower = Tower(dtype, size=side)
    assert tower_cost(tower, "torch") == count_tower(tower)


@needs_cudnn
@sixteen
@pytest.mark.parametrize("case", TOWERS)
def test_tower_at_any_size(case, dtype):
    tower = Tower(dtype, **TOWERS[case])
    assert tower_cost(tower, "torch") == count_tower(tower)


@needs_cudnn
@pytest.mark.parametrize("budget", [7 * 4 * 8 * 4, 1000, 2000])
def test_tower_in_chunks(budget, monkeypatch):
    """Chunks may have any size, and the last one may be shorter; each reads the weights again."""
    tower = Tower(torch.float32, **TOWERS["two pictures"])
    whole = tower_cost(tower, "torch")
    monkeypatch.setattr(convnext, "GPU_EXPANSION", budget)
    assert tower_cost(tower, "torch") == count_tower(tower) != whole


@dtypes
@pytest.mark.parametrize("form", FORMS)
@towers
def test_blocks_by_kernels(side, form, dtype):
    """Each kernel counts as one operator, on fake tensors of a GPU; all forms run the same beside the blocks."""
    pytest.importorskip("triton")
    tower = Tower(dtype, size=side)
    with FakeTensorMode(), torch.no_grad():
        _, stages = convnext.empty_tower(tower.dims, tower.depths, dtype=dtype, device="cuda")
        maps = [
            torch.empty(1, int(rows**0.5), int(rows**0.5), c, dtype=dtype, device="cuda")
            for rows, c in zip(tower.rows, tower.dims)
        ]
        stages = as_packed(stages, dtype, form)
        with Count("cuda") as counter:
            for stage, x in zip(stages, maps):
                convnext.run_stage(convnext.StageTensors(None, stage.blocks), x, form, in_place=True)
    cost = tower_cost(tower, form) + tower_cost(replace(tower, depths=(0, 0, 0, 0)), form) * -1
    assert (cost.bytes_read, cost.bytes_written) == (counter.total.bytes_read, counter.total.bytes_written)
    # The arithmetic is the same in every form, but for the library's eight more hidden channels in 16 bits.
    blocks = zip(tower.rows, tower.dims, tower.depths)
    further = sum(2 * product_flop(rows, c, EXTRA) * depth for rows, c, depth in blocks)
    wide = further * (dtype.itemsize == 2 and form != "triton")
    assert tower_cost(tower, form).flop == tower_cost(tower, "triton").flop + wide


@pytest.mark.parametrize("case", TOWERS)
def test_floor_of_the_tower(case):
    """The floor has the picture, every tensor of the tower, and the maps that it returns, each once."""
    tower = Tower(torch.bfloat16, **TOWERS[case])
    stem, stages = convnext.empty_tower(tower.dims, tower.depths, dtype=tower.dtype, device="meta")
    pixels = torch.empty(tower.batch, 3, tower.size, tower.size, dtype=tower.dtype, device="meta")
    tensors = [t for t in tree_leaves([stem, stages]) if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        maps = convnext.run_tower(stem, stages, pixels, "torch")
    assert tower_floor(tower).bytes == sum(t.nbytes for t in (pixels, *tensors, *maps))


def test_an_empty_tower_is_made_of_the_tensors_of_a_real_one():
    sizes = dict(dims=(8, 12, 20, 36), depths=(2, 1, 3, 1))
    real, empty = ConvNeXtPyramid.from_dims(**sizes).read(), convnext.empty_tower(**sizes)
    shapes, expected = (
        tree_map(lambda leaf: (leaf.shape, leaf.stride()) if isinstance(leaf, torch.Tensor) else leaf, made)
        for made in (empty, real)
    )
    assert shapes == expected


def test_known_figures_of_the_tower():
    """FLOP as counted for timm's tower; bytes as estimated: 14 maps are moved per block, and the weights."""
    standard, hd = (Tower(torch.bfloat16, size=side) for side in (768, 1536))
    assert tower_cost(standard, "triton").flop == pytest.approx(0.808e12, rel=1e-3)
    assert tower_cost(hd, "triton").flop == pytest.approx(3.231e12, rel=1e-3)
    assert tower_cost(standard, "triton").bytes == pytest.approx(2.79e9, rel=0.03)
    assert tower_cost(hd, "triton").bytes == pytest.approx(9.96e9, rel=0.03)


def test_known_figures():
    """The projections of the original are computed by hand; the bytes are an estimate of the large tensors alone."""
    standard, hd = (Sizes.of_picture(side, torch.bfloat16) for side in (768, 1536))
    pixels = 192 * 192
    assert (
        reference_mining(standard).flop == 2 * pixels * 2880 * 1024 * 2 + 2 * 576 * 1024 * 1024 + 2 * pixels * 1024 * 2
    )
    assert reference_mining(standard).bytes == pytest.approx(3.58e9, rel=0.03)
    assert reference_mining(hd).flop == 5 * reference_mining(standard).flop
    assert reference_mining(hd).bytes == pytest.approx(23.5e9, rel=0.03)
    assert torch_mining(standard).flop == pytest.approx(8.2e9, rel=0.02)


def test_floor():
    """The floor has every tensor that goes in or comes out, once, without the key's biases, which change nothing."""
    sizes = Sizes(torch.bfloat16, **SMALL["HD"])
    queries, pyramid, query, key, value = inputs(sizes, "meta")
    tensors = [queries, queries, *pyramid, *query, key.norm_weight, key.weight, *value]
    assert mining_floor(sizes).bytes == sum(t.nbytes for t in tensors)


def test_memory_by_formula():
    """Peaks against those that were measured or counted.

    The original's steps were measured in float32 on a CPU: 1508 and 6446 MiB.
    """
    standard, hd = (Sizes.of_picture(side, torch.float32) for side in (768, 1536))
    assert peak_memory.reference_peak(standard) / 2**20 == pytest.approx(1508, rel=0.01)
    assert peak_memory.reference_peak(hd) / 2**20 == pytest.approx(6446, rel=0.01)
    half = Sizes.of_picture(1536, torch.bfloat16)
    assert peak_memory.reference_peak(half) > 3e9 and peak_memory.kernel_peak(half) < 0.3e9
    # These were counted at torch's dispatcher with fake tensors: pictures of 768 and 1536 pixels to tokens; the copies
    # that the packed towers hold.
    for side, original, ours in ((768, 829.6e6, 98.7e6), (1536, 3747e6, 397.2e6)):
        sizes = Sizes.of_picture(side, torch.bfloat16)
        assert peak_memory.reference_picture_peak(sizes) == pytest.approx(original, rel=0.01)
        assert peak_memory.kernel_picture_peak(sizes) == pytest.approx(ours, rel=0.01)
    assert peak_memory.packed_bytes(torch.bfloat16) == pytest.approx(538.1e6, rel=0.01)
    for side in peak_memory.SIDES:
        sizes = Sizes.of_picture(side, torch.bfloat16)
        # Windows and maps are whole.
        assert sizes.window * sizes.grid * sizes.side == sizes.levels[0][0] and side % 32 == 0


def test_table(capsys):
    pytest.importorskip("triton")
    assert main(["formulas"]) == 0
    out = capsys.readouterr().out
    assert "768 bfloat16                          reference                  436.2   3655.9" in out
    assert "tower 768 bfloat16                    triton                     807.8   2829.6" in out
