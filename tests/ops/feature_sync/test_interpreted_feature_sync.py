"""The interpreted kernel of feature_sync agrees with the float64 oracle, and keeps what else a caller may rely on."""

import contextlib
import math

import pytest
import torch
import torch._dynamo.testing

from bench.cases.settings import deterministic
from mg_fast import BackendError, ops, use_backend
from mg_fast.kernels import sampling_configs
from mg_fast.testing.tolerances import assert_accurate
from tests.ops.feature_sync.inputs import (
    DTYPES,
    SHAPES,
    SIZES,
    TINY,
    Inputs,
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


def kernel(inputs: Inputs) -> torch.Tensor:
    return run(inputs, "triton")


@pytest.fixture(params=["few", "some", "many"])
def number(request, monkeypatch):
    """Runs a test with the tile of each number of queries, whatever the number is."""
    monkeypatch.setattr(sampling_configs, "MOST_QUERIES", {} if request.param == "many" else {request.param: 10**6})
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_accuracy(case, dtype):
    inputs = shaped(SHAPES[case], dtype=dtype)
    ours = kernel(inputs)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(inputs), exact(inputs))


# (B, Q, n, H, D, P, sizes): tiles that end early, several rounds of pictures, and channels in several programs.
ODD = {
    "more queries than a tile": (1, 35, 1, 1, 4, 1, ((2, 3),)),
    "eight points": (1, 2, 3, 1, 4, 8, ((4, 3), (2, 2), (2, 1), (1, 1))),
    "five pictures": (1, 2, 5, 1, 4, 3, ((2, 3), (1, 2))),
    "more pictures than a tile": (1, 1, 17, 1, 4, 6, ((2, 2),)),
    "thirty-two points": (1, 1, 1, 1, 4, 32, ((2, 2),)),
    "forty channels": (1, 2, 1, 2, 40, 2, ((3, 3),)),
    "eighty channels": (1, 2, 1, 1, 80, 2, ((3, 3),)),
    "one pixel": (1, 2, 1, 1, 1, 1, ((1, 1),)),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_sizes(case, number):
    inputs = shaped(ODD[case])
    assert_accurate(kernel(inputs), plain(inputs), exact(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_another_dtype(dtype):
    inputs = make(**TINY, dtype=dtype, query_dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
    ours = kernel(inputs)
    assert ours.dtype == dtype
    assert_accurate(ours, plain(inputs), exact(inputs))


@pytest.mark.parametrize("logits", [60.0, 1e4])
def test_logits_of_any_size(logits, number):
    inputs = make(**TINY, logits=logits)
    assert torch.allclose(kernel(inputs).double(), by_hand(inputs), rtol=1e-4, atol=2e-5)


def test_who_sees_nothing_reads_what_is_ignored(number):
    inputs = make(**TINY)
    inputs.index[0, 2] = 0
    inputs.index[1] = 0
    out = kernel(inputs)
    assert all(row.equal(inputs.ignore) for row in (out[0, 2], *out[1]))
    assert not kernel(inputs._replace(ignore=None))[0, 2].any()


def test_pictures_that_nobody_sees_change_nothing(number):
    inputs = make(**TINY)
    inputs.table[0] = math.nan
    assert torch.allclose(kernel(padded(inputs, 3)), kernel(inputs), rtol=1e-5, atol=1e-6)


def test_one_query_equals_the_last_of_many(number):
    inputs = make(**TINY)
    last = inputs._replace(
        queries=inputs.queries[:, -1:], index=inputs.index[:, -1:], reference_points=inputs.reference_points[:, -1:]
    )
    assert torch.equal(kernel(last), kernel(inputs)[:, -1:])


def test_arguments_that_all_rows_or_queries_share():
    inputs = make(**TINY)
    shared = inputs._replace(
        values=inputs.values[:1].expand_as(inputs.values),
        index=inputs.index[:, :1],
        reference_points=inputs.reference_points[:1, :1],
    )
    assert torch.allclose(kernel(shared), plain(shared), rtol=1e-5, atol=1e-6)


def test_layouts():
    inputs = make(**TINY | dict(queries=2, points=1, channels=16))
    expected = kernel(inputs)
    for name, layout in layouts(inputs).items():
        assert torch.allclose(kernel(layout), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [1e30, math.inf, math.nan])
def test_offsets_that_lead_outside_read_nothing(bad, number):
    inputs = make(**TINY)
    inputs.queries[0, 0, : 2 * 2 * 2] = bad
    nothing = inputs._replace(values=torch.zeros_like(inputs.values))
    out = kernel(inputs)[0, 0]
    assert out.isfinite().all() and torch.allclose(out, kernel(nothing)[0, 0], rtol=1e-5, atol=1e-6)


def test_samples_on_the_edges_of_a_map():
    """Locations at and around the first and the last half pixel, where one tap after the other leaves the map."""
    edges = [-0.5, -0.25, 0.0, 0.25, 0.5, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5]
    inputs = make(1, len(edges), 1, 1, 4, 1, ((4, 4),), offsets=0.0)
    inputs.index[:] = 1
    for axis in range(2):
        points = torch.full((1, len(edges), 2), 0.5)
        points[0, :, axis] = torch.tensor(edges) / 4
        moved = inputs._replace(reference_points=points)
        assert torch.allclose(kernel(moved).double(), by_hand(moved), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_is_seen_where_the_picture_is(number):
    inputs = make(**TINY, offsets=0.1)
    inputs.index[:] = torch.tensor([1, 0])
    inputs.index[1, 2] = torch.tensor([2, 1])
    inputs.values[1, 1] = math.nan
    out = kernel(inputs)
    assert out[1, 2].isnan().all()
    out[1, 2] = 0
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("row", [-1, 4, 10**12])
def test_an_index_that_the_table_does_not_have_makes_its_query_nan(row, number):
    inputs = make(**TINY)
    expected = kernel(inputs)
    inputs.index[1, 2, 1] = row
    out = kernel(inputs)
    assert out[1, 2].isnan().all()
    out[1, 2] = expected[1, 2]
    assert torch.equal(out, expected)


@pytest.fixture
def read(monkeypatch):
    """The addresses that interpreted loads read, one list for each load."""
    from triton.runtime import interpreter

    if not interpreter.interpreter_builder:
        pytest.skip("needs the interpreter")
    addresses, original = [], type(interpreter.interpreter_builder).create_masked_load

    def load(self, pointers, mask, *rest):
        addresses.append(pointers.data[mask.data.astype(bool)].ravel().tolist())
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(type(interpreter.interpreter_builder), "create_masked_load", load)
    return addresses


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_of_a_masked_picture_is_read(number, read):
    """Neither its values nor the table's first row are read, nor what lies behind the table."""
    inputs = make(batch=1, queries=3, pictures=3, heads=1, channels=4, points=2)
    memory = inputs.table.repeat(3, 1)
    inputs = inputs._replace(table=memory[:5])
    inputs.index[:] = torch.tensor([2, 0, 9])
    kernel(inputs)

    def within(tensor):
        first = tensor.data_ptr()
        return any(first <= address < first + tensor.nbytes for address in sum(read, []))

    assert within(inputs.values[0, 0]) and within(inputs.table[2])
    assert not within(inputs.values[0, 1]) and not within(inputs.values[0, 2])
    assert not within(memory[:2]) and not within(memory[3:])


def test_pictures_that_no_query_sees_cost_no_load(number, read):
    """They are skipped by a branch: loads that are masked would take time, too."""
    inputs = make(batch=1, queries=2, pictures=3, heads=1, channels=4, points=2)
    inputs.index[:] = 0
    kernel(inputs)
    none = len(read)
    inputs.index[:, :, 1] = 1
    kernel(inputs)
    assert len(read) - none > 3 * none


def test_offsets_beyond_32_bits(tmp_path):
    """Pictures, and pixels of a picture, that lie more than 2^31 elements apart."""
    for apart in ("pictures", "pixels"):
        # The middle of both maps is read: pixels 1 and 3.
        inputs = make(1, 1, 3, 1, 2, 1, ((1, 3), (1, 1)), dtype=torch.float16, offsets=0.0)
        inputs.index[:] = torch.tensor([1, 2, 3])
        inputs.reference_points[:] = 0.5
        strides = (0, 2**30, 2, 2, 1) if apart == "pictures" else (0, 4, 2**30, 2, 1)
        size = sum(stride * (length - 1) for stride, length in zip(strides, inputs.values.shape)) + 1
        # A file without contents, of which only the few pages that are written take space.
        memory = torch.from_file(str(tmp_path / apart), shared=True, size=size, dtype=torch.float16)
        values = memory.as_strided(inputs.values.shape, strides)
        values.copy_(inputs.values)
        assert torch.equal(kernel(inputs._replace(values=values)), kernel(inputs))


@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0), dict(pictures=0)], ids=str)
def test_nothing(shape):
    inputs = make(**TINY | shape)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves]
    out = kernel(inputs.with_leaves(*leaves))
    assert out.shape == (len(inputs.values), inputs.queries.shape[1], 6)
    assert torch.equal(out, inputs.ignore.expand_as(out))
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert torch.equal(inputs.ignore.grad, torch.full((6,), float(out[..., 0].numel())))


@pytest.mark.parametrize("backend, sorting", [("triton", False), ("triton", True), ("torch", False)])
def test_gradients_of_samples_in_each_form(backend, sorting):
    """The samples' gradients are those of deformable attention, by its kernels where they are asked for.

    Where torch is asked for deterministic algorithms, the gradient of values is its sorted sum.
    """
    inputs = make(**TINY)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves]
    out = kernel(inputs.with_leaves(*leaves))
    with (
        deterministic() if sorting else contextlib.nullcontext(),
        use_backend(backend),
        torch.profiler.profile(acc_events=True) as profile,
    ):
        found = torch.autograd.grad(out, leaves, upstream)
    called = {event.key for event in profile.key_averages()}
    assert ("mg_fast::deformable_attention_backward" in called) == (backend == "triton")
    assert ("mg_fast::deformable_attention_sum" in called) == sorting
    for ours, other in zip(found, gradients(inputs, "reference", upstream)):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    inputs = make(**TINY, dtype=dtype)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = gradients(double(inputs), "reference", upstream)
    for leaf, ours, base, oracle in zip(
        inputs.leaves, gradients(inputs, "triton", upstream), gradients(inputs, "reference", upstream), wanted
    ):
        assert ours.dtype == leaf.dtype
        assert_accurate(ours, base, oracle, rows=6)


def test_gradients_of_shared_arguments(monkeypatch):
    """Gradients of arguments that rows or queries share add up, also over parts of the queries."""
    monkeypatch.setattr(ops.feature_sync.__globals__["torch_form"], "SAMPLES", 40)
    inputs = make(**TINY)._replace(ignore=None)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    shared = [inputs.values[:1], inputs.queries, inputs.table, inputs.reference_points[:1, :1]]
    found = {}
    for backend in ("triton", "reference"):
        leaves = [leaf.clone().requires_grad_() for leaf in shared]
        given = inputs.with_leaves(leaves[0].expand_as(inputs.values), *leaves[1:], None)
        found[backend] = torch.autograd.grad(run(given._replace(index=inputs.index[:, :1]), backend), leaves, upstream)
    for ours, other in zip(found["triton"], found["reference"]):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_see_what_is_masked():
    inputs = make(**TINY)
    upstream = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    expected = gradients(inputs, "triton", upstream)
    more = padded(inputs, 2)
    more.table[0] = math.nan
    found = list(gradients(more, "triton", upstream))
    assert not found[0][:, 0].any() and not found[0][:, 3:].any() and not found[2][0].any()
    found[0] = found[0][:, 1:3]
    for ours, other in zip(found, expected):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


def test_only_what_is_wanted_has_a_gradient():
    inputs = make(**TINY)
    inputs.queries.requires_grad_()
    kernel(inputs).square().sum().backward()
    others = [inputs.values, inputs.table, inputs.reference_points, inputs.ignore]
    assert inputs.queries.grad.any() and all(leaf.grad is None for leaf in others)


def test_operators_keep_torchs_rules():
    inputs = make(**TINY | dict(batch=1, queries=1))
    leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves]
    values, queries, table, points, ignore = leaves
    sides = [side for size in SIZES for side in size]
    torch.library.opcheck(
        torch.ops.mg_fast.feature_sync.default, (values, queries, table, inputs.index, points, sides, 4, ignore)
    )
    grad, wanted = torch.ones(1, 1, 6), [True, False, True, True, False]
    torch.library.opcheck(
        torch.ops.mg_fast.feature_sync_backward.default, (grad, inputs.index, inputs.leaves, wanted, sides, 4)
    )


def test_nothing_waits_for_the_device_and_nothing_large_is_made():
    inputs = make(**TINY | dict(queries=40, points=4))
    samples = 2 * 40 * 2 * 2 * 2 * 4
    with torch.inference_mode(), no_waiting(samples - 1):
        out = kernel(inputs)
    assert out.numel() < samples


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_graph_under_compile(backend):
    torch._dynamo.reset()
    inputs = make(**TINY)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *leaves: run(inputs.with_leaves(*leaves), backend), backend=counter, fullgraph=True)
    leaves, others = ([leaf.clone().requires_grad_() for leaf in inputs.leaves] for _ in range(2))
    ours, expected = compiled(*leaves), run(inputs.with_leaves(*others), backend)
    assert torch.allclose(ours, expected, atol=1e-6) and counter.frame_count == 1
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), others)
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_autocast():
    inputs = make(**TINY)
    with torch.autocast("cpu", torch.bfloat16):
        ours = kernel(inputs)
    assert torch.equal(ours, kernel(inputs))


def test_what_the_kernel_does_not_take():
    with pytest.raises(BackendError, match="cannot run feature_sync: the kernel takes up to 32 points, got 33"):
        kernel(make(**TINY | dict(points=33)))
    with pytest.raises(BackendError, match="the kernel takes up to 8 levels, got 9"):
        kernel(make(**TINY, sizes=((1, 1),) * 9))
    with pytest.raises(
        BackendError, match="the kernel takes values in float16, bfloat16 and float32, got torch.float64"
    ):
        kernel(double(make(**TINY)))
    with pytest.raises(
        BackendError, match="the kernel takes queries in float16, bfloat16 and float32, got torch.float64"
    ):
        kernel(make(**TINY, query_dtype=torch.float64))
