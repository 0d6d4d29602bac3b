"""feature_sync's PyTorch forms on the CPU agree with float64 and with the formula, and refuse what does not fit."""

import math

import pytest
import torch

from bench.counting import Count
from mg_fast import BackendError
from mg_fast.ops.torch import feature_sync as torch_form
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.ops.feature_sync.inputs import (
    DTYPES,
    SHAPES,
    TINY,
    by_hand,
    double,
    exact,
    gradients,
    layouts,
    make,
    padded,
    plain,
    run,
    shaped,
)
from tests.waiting import no_waiting


@pytest.fixture(params=[0, math.inf], ids=["by levels", "by pixels"])
def way(request, monkeypatch):
    """Runs a test with each of the two ways in which the PyTorch form reads pixels."""
    monkeypatch.setattr(torch_form, "FEW", request.param)


def test_reference_is_the_formula():
    inputs = double(make(**TINY))
    assert torch.allclose(plain(inputs), by_hand(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_reads_pixels_more_than_15_bits_apart(dtype):
    """torch's own grid_sample of 16-bit numbers does not, on a CPU."""
    inputs = make(1, 2, 1, 16, 64, 1, ((6, 6),), dtype=dtype)
    inputs.index[:] = 1
    assert relative_error(plain(inputs), exact(inputs)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_accuracy(case, dtype, way):
    inputs = shaped(SHAPES[case], dtype=dtype)
    ours = run(inputs, "torch")
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(inputs), exact(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_another_dtype(dtype, way):
    inputs = make(dtype=dtype, query_dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
    ours = run(inputs, "torch")
    assert ours.dtype == dtype
    assert_accurate(ours, plain(inputs), exact(inputs))


@pytest.mark.parametrize("logits", [60.0, 1e4])
def test_logits_of_any_size(logits, way):
    inputs = make(**TINY, logits=logits)
    assert torch.allclose(run(inputs, "torch").double(), by_hand(inputs), rtol=1e-4, atol=2e-5)


def test_the_way_follows_from_the_number_of_pixels(monkeypatch):
    """One of the language model's tokens reads few of the pixels of a picture, a grid of queries reads most."""
    found = []
    for way in ("_by_levels", "_by_pixels"):
        original = getattr(torch_form, way)
        monkeypatch.setattr(torch_form, way, lambda *given, f=original, way=way: found.append(way) or f(*given))
    for queries in (1, 64):
        run(make(1, queries, 1, 1, 2, 8, ((32, 32), (16, 16), (8, 8))), "torch")
    assert found == ["_by_pixels", "_by_levels"]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_who_sees_nothing_reads_what_is_ignored(backend, way):
    inputs = make()
    inputs.index[0, 2] = 0
    inputs.index[1] = 0
    out = run(inputs, backend)
    for row in (out[0, 2], *out[1]):
        assert torch.allclose(row, inputs.ignore, rtol=1e-6, atol=0) and (
            backend == "reference" or row.equal(inputs.ignore)
        )
    assert not run(inputs._replace(ignore=None), backend)[0, 2].any()


def test_pictures_that_nobody_sees_change_nothing(way):
    inputs = make()
    inputs.table[0] = math.nan
    assert torch.allclose(run(padded(inputs, 3), "torch"), run(inputs, "torch"), rtol=1e-5, atol=1e-6)


def test_one_query_equals_the_last_of_many(way):
    inputs = make()
    last = inputs._replace(
        queries=inputs.queries[:, -1:], index=inputs.index[:, -1:], reference_points=inputs.reference_points[:, -1:]
    )
    assert torch.allclose(run(last, "torch"), run(inputs, "torch")[:, -1:], rtol=1e-5, atol=1e-6)


def test_arguments_that_all_rows_or_queries_share():
    inputs = make()
    shared = inputs._replace(
        values=inputs.values[:1].expand_as(inputs.values),
        index=inputs.index[:, :1],
        reference_points=inputs.reference_points[:1, :1],
    )
    whole = shared._replace(
        values=shared.values.contiguous(),
        index=shared.index.expand_as(inputs.index),
        reference_points=shared.reference_points.expand_as(inputs.reference_points),
    )
    for backend in ("reference", "torch"):
        assert torch.allclose(run(shared, backend), run(whole, backend), rtol=1e-6, atol=1e-6)


def test_layouts(way):
    inputs = make()
    expected = run(inputs, "torch")
    for name, layout in layouts(inputs).items():
        assert torch.allclose(run(layout, "torch"), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("bad", [1e30, math.inf, math.nan])
def test_offsets_that_lead_outside_read_nothing(bad, way):
    inputs = make(**TINY)
    inputs.queries[0, 0, : 2 * 2 * 2] = bad
    out = run(inputs, "torch")
    nothing = inputs._replace(values=torch.zeros_like(inputs.values))
    assert out[0, 0].isfinite().all() and torch.allclose(out[0, 0], run(nothing, "torch")[0, 0], rtol=1e-5, atol=1e-6)


def test_nan_is_seen_where_the_picture_is(way):
    inputs = make(offsets=0.1)
    inputs.index[:] = torch.tensor([1, 0, 2])
    inputs.index[1, 3] = torch.tensor([2, 1, 0])
    inputs.values[1, 1] = math.nan
    out = run(inputs, "torch")
    assert out[1, 3].isnan().all()
    out[1, 3] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("row", [-1, 5, 10**12])
def test_an_index_that_the_table_does_not_have_makes_its_query_nan(row, way):
    inputs = make()
    expected = run(inputs, "torch")
    inputs.index[1, 2, 1] = row
    out = run(inputs, "torch")
    assert out[1, 2].isnan().all()
    out[1, 2] = expected[1, 2]
    assert torch.equal(out, expected)


def test_queries_are_taken_in_parts(monkeypatch):
    inputs = make()
    expected = run(inputs, "torch")
    monkeypatch.setattr(torch_form, "SAMPLES", 100)
    assert torch.allclose(run(inputs, "torch"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0), dict(pictures=0)], ids=str)
def test_nothing(shape, backend):
    inputs = make(**shape)
    out = run(inputs, backend)
    assert out.shape == (len(inputs.values), inputs.queries.shape[1], 16)
    assert torch.equal(out, inputs.ignore.expand_as(out))


def test_gradients(way):
    inputs = make(**TINY)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    wanted = gradients(double(inputs), "reference", upstream)
    for ours, base, oracle in zip(
        gradients(inputs, "torch", upstream), gradients(inputs, "reference", upstream), wanted
    ):
        assert_accurate(ours, base, oracle, rows=6)


def test_gradients_do_not_see_what_is_masked(way):
    inputs = make(**TINY)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    expected = gradients(inputs, "torch", upstream)
    more = padded(inputs, 2)
    more.table[0] = math.nan
    found = list(gradients(more, "torch", upstream))
    assert not found[0][:, 0].any() and not found[0][:, 3:].any() and not found[2][0].any()
    found[0] = found[0][:, 1:3]
    for ours, other in zip(found, expected):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_device(way):
    """Tensors without memory have no numbers to wait for. On a CPU a form may look at some."""
    inputs = make()
    meta = inputs.with_leaves(*(leaf.to("meta") for leaf in inputs.leaves))
    with no_waiting():
        assert run(meta._replace(index=inputs.index.to("meta")), "torch").shape == (2, 5, 16)


def test_peak_memory_of_a_grid():
    """At the largest block of the UNet the form needs less than a quarter of what the reference needs."""
    sizes = ((64, 64), (32, 32), (16, 16), (8, 8))
    inputs = make(1, 2, 1, 16, 64, 8, sizes)
    meta = inputs.with_leaves(*(leaf.to("meta") for leaf in inputs.leaves))
    width = inputs.queries.shape[2]
    meta = meta._replace(
        queries=torch.empty(1, 4096, width, device="meta"),
        index=torch.empty(1, 1, 1, dtype=torch.int64, device="meta"),
        reference_points=torch.empty(1, 4096, 2, device="meta"),
    )
    peaks = []
    for backend in ("reference", "torch"):
        with torch.inference_mode(), Count() as count:
            run(meta, backend)
        peaks.append(count.peak)
    assert peaks[1] < peaks[0] / 4, peaks


REFUSED = {
    "four dimensions": (dict(values=lambda t: t[0]), r"values must be \[B, n, S, H, D\], got \[3, 30, 2, 8\]"),
    "integer values": (dict(values=lambda t: t.int()), "values must be floating point, got torch.int32"),
    "an index of floats": (
        dict(index=lambda t: t.float()),
        "index must be torch.int32 or torch.int64, got torch.float",
    ),
    "another device": (dict(queries=lambda t: t.to("meta")), "queries must be on cpu as values are, got meta"),
    "another batch": (dict(queries=lambda t: t[:1]), r"queries must be of batch 2 as values are, got \[1, 5, 16\]"),
    "a width of no points": (
        dict(queries=lambda t: t[..., :15]),
        r"width of queries must be a multiple of heads \* \(2 \+ levels\) = 8, got 15",
    ),
    "a table of another width": (
        dict(table=lambda t: t[:, :8]),
        r"table must be \[R, 16\] in torch.float32 as queries are, got \[5, 8\] in torch.float32",
    ),
    "a table of another dtype": (dict(table=lambda t: t.half()), r"as queries are, got \[5, 16\] in torch.float16"),
    "an empty table": (dict(table=lambda t: t[:0]), "table must have at least one row where there are pictures"),
    "an index of another length": (
        dict(index=lambda t: t[..., :2]),
        r"index must be \[2, 5, 3\] or \[2, 1, 3\], got \[2, 5, 2\]",
    ),
    "reference points of another number": (
        dict(reference_points=lambda t: t[:, :4]),
        r"reference_points must be \[2 or 1, 5 or 1, 2\], got \[2, 4, 2\]",
    ),
    "other levels": (
        dict(spatial_shapes=lambda _: ((4, 6),)),
        r"the levels \[\(4, 6\)\] have 24 pixels, but value has 30",
    ),
    "no base": (dict(base=lambda _: 0), "base must be a positive whole number, got 0"),
    "half a base": (dict(base=lambda _: 2.5), "base must be a positive whole number, got 2.5"),
    "a short ignore": (
        dict(ignore=lambda t: t[1:]),
        r"ignore must be \[16\] in torch.float32 as values are, got \[15\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case):
    changes, message = REFUSED[case]
    inputs = make()
    changed = inputs._replace(**{name: change(getattr(inputs, name)) for name, change in changes.items()})
    with pytest.raises(ValueError, match=f"feature_sync: .*{message}"):
        run(changed, "torch")


def test_the_kernel_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run feature_sync: triton "):
        run(make(), "triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast(backend):
    """Nothing is rounded further: the result has the dtype of values, and the accuracy of the given dtypes."""
    inputs = make()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(inputs, backend)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, run(inputs, backend), rtol=1e-5, atol=1e-5)
