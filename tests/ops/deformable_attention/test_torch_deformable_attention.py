"""The sums of rows, which the torch form takes for many samples, agree with float64 and keep to their memory."""

import math

import pytest
import torch
import torch._dynamo.testing

from bench.counting import Count
from mg_fast import ops
from mg_fast.ops.torch import deformable_attention as torch_form
from mg_fast.testing.tolerances import assert_accurate
from tests.ops.deformable_attention import test_deformable_attention as shared
from tests.ops.deformable_attention.test_deformable_attention import DTYPES, SHAPES, exact, layouts, make, plain


@pytest.fixture(autouse=True)
def rows_for_few_samples(monkeypatch):
    """Sums of rows are taken for the few samples of a test, too, and some queries at a time."""
    monkeypatch.setattr(torch_form, "FEWEST", 0)
    monkeypatch.setattr(torch_form, "TOGETHER", 40)


def rows(*inputs):
    return ops.deformable_attention(*inputs, backend="torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    inputs = make(*shape, dtype=dtype)
    ours = rows(*inputs)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(*inputs), exact(*inputs))


def test_borders_are_those_of_the_definition():
    shared.borders_are_those_of_the_definition("torch")


def test_what_is_not_finite_is_seen_where_it_belongs():
    """The first pixel, which pixels outside are read from, is among those that are not finite."""
    shared.what_is_not_finite_is_seen_where_it_belongs("torch")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_row_is_not_read_by_samples_outside(bad):
    value, levels, locations, weights = make(3, 2, 8, 2, batch=2)
    value[:, 0, 0] = bad
    ours = rows(value, levels, locations + 10, weights)
    assert ours.shape == (2, 3, 16) and not ours.any()


def test_layouts():
    value, *rest = make()
    expected = rows(value, *rest)
    for name, layout in layouts(value).items():
        assert torch.equal(rows(layout, *rest), expected), name


def test_mixed_dtypes():
    value, levels, locations, weights = make(dtype=torch.bfloat16)
    inputs = value, levels, locations.half(), weights.double()
    ours = rows(*inputs)
    assert ours.dtype == torch.bfloat16
    assert_accurate(ours, plain(*inputs), exact(*inputs))


def test_rows_that_need_64_bits():
    """A row's number may need 64 bits, though no value of that size fits here: what is computed is the number alone."""
    heads, levels = 2**14, [(2**9, 2**9), (1, 2)]
    locations = torch.full((1, 1, 1, 2, 1, 2), 0.5).expand(1, 1, heads, 2, 1, 2)
    found = torch_form.pixel_rows(locations, levels)
    assert found.dtype == torch.int64
    pixels = torch.tensor([2**9 * (y - 1) + x - 1 for y in (2**8, 2**8 + 1) for x in (2**8, 2**8 + 1)])
    assert torch.equal(found[0, 0, -1, 0], pixels * heads + heads - 1)
    # The second level has one row of pixels, and the sample lies between them.
    outside = (2**18 + 2) * heads
    beside = [2**18 * heads + heads - 1, (2**18 + 1) * heads + heads - 1]
    assert found[0, 0, -1, 1].tolist() == [*beside, outside, outside]
    assert torch_form.pixel_rows(locations[:, :, :4], levels).dtype == torch.int32


def test_grid_sample_is_taken_where_it_is_the_better_one(monkeypatch):
    taken = []
    for name in ("by_grid_sample", "by_sums_of_rows"):
        original = getattr(torch_form, name)

        def spy(*inputs, name=name, original=original):
            taken.append(name)
            return original(*inputs)

        monkeypatch.setattr(torch_form, name, spy)
    monkeypatch.setattr(torch_form, "FEWEST", 2**10)
    few, many = make(1), make(64)
    rows(*few)
    rows(*many)
    # A copy of a large value takes longer than everything else.
    monkeypatch.setattr(torch_form, "SMALLEST", few[0].numel() - 1)
    rows(*few)
    many[2].requires_grad_()
    rows(*many)
    with torch.no_grad():
        rows(*many)
    assert [name.split("_")[1] for name in taken] == ["grid", "sums", "sums", "grid", "sums"]


@pytest.mark.parametrize(
    "sizes",
    [
        (300, 8, 32, 4, [(80, 80), (40, 40), (20, 20)]),  # RT-DETR
        (1344, 16, 32, 4, [(16, 16)]),  # the extractor of MM-Interleaved's adapter
        (128, 16, 64, 8, [(32, 32), (16, 16), (8, 8)]),  # a part of a prompt of its language model
    ],
    ids=str,
)
def test_peak_memory_is_at_most_half_of_grid_samples(sizes, monkeypatch):
    monkeypatch.undo()
    queries, heads, channels, points, levels = sizes
    pixels = sum(h * w for h, w in levels)
    value = torch.zeros(1, pixels, heads, channels)
    locations = torch.full((1, queries, heads, len(levels), points, 2), 0.4)
    weights = torch.ones(locations.shape[:-1])
    peaks = []
    for form in (torch_form.by_grid_sample, torch_form.by_sums_of_rows):
        with torch.inference_mode(), Count() as count:
            form(value, levels, locations, weights)
        peaks.append(count.peak)
    assert 2 * peaks[1] <= peaks[0]


def test_one_graph_for_all_sizes_under_compile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rows, backend=counter, fullgraph=True, dynamic=True)
    # Sizes that are equal by chance would be taken for one number.
    for inputs in (make(13, 3, 16, 5, [(4, 6), (7, 1)]), make(15, 3, 16, 5, [(9, 8), (10, 11)])):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), rows(*inputs), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
