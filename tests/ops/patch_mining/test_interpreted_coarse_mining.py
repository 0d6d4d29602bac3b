"""Patch mining on coarse pixels, interpreted: accuracy, gradients, and which of the two kernels runs."""

import contextlib
import math

import pytest
import torch

from mg_fast import BackendError, ops
from mg_fast.ops import reference
from mg_fast.ops.reference import Projection
from mg_fast.testing.tolerances import assert_accurate
from tests.draws import normal
from tests.interpreting import INTERPRETED
from tests.ops.patch_mining.test_torch_patch_mining import make, oracle

DTYPES = [torch.bfloat16, torch.float16]
WINDOWS = dict(side=1, window=4, dims=(6, 10, 14))
SHAPES = {
    # The four windows of two a side lie at the border, and their coarse pixels reach beyond it.
    "windows at the border": dict(side=2, window=4, dims=(6, 10, 14)),
    "wider than a block of channels": dict(side=1, dims=(70, 130)),
    "HD, maps that do not halve": dict(side=1, window=5, grid=2),
}
HD = dict(WINDOWS, grid=2)


def mine(queries, pyramid, projections, grid, kernel="coarse"):
    return ops.patch_mining(queries, pyramid, *projections, grid=grid, backend="triton", kernel=kernel)


def plain_form(queries, pyramid, projections, grid):
    return reference.patch_mining(queries, pyramid, *projections, grid=grid)


def assert_accurate_without_gradients(inputs):
    with torch.no_grad():
        ours = mine(*inputs)
        assert ours.dtype == inputs[0].dtype and ours.shape == inputs[0].shape
        assert_accurate(ours, plain_form(*inputs), oracle(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_accuracy(case, dtype):
    assert_accurate_without_gradients(make(**SHAPES[case], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [50.0, 1000.0])
def test_large_common_offset(dtype, offset):
    """The variance does not drown where the mean of the features is many times their spread."""
    assert_accurate_without_gradients(make(**HD, offset=offset, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pixel_far_from_the_others(dtype):
    queries, pyramid, projections, grid = make(1, dims=(40, 40), dim=16, dtype=dtype)
    for level in pyramid:
        level[:, 0, 0] += 1000.0
    assert_accurate_without_gradients((queries, pyramid, projections, grid))


def test_features_near_the_largest_of_float16():
    queries, pyramid, projections, grid = make(**WINDOWS, dtype=torch.float16)
    largest = [level * (6e4 / level.abs().max()) for level in pyramid]
    assert all(level.isfinite().all() for level in largest)
    assert_accurate_without_gradients((queries, largest, projections, grid))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_where_it_belongs(bad):
    """A pixel is seen by the windows in which it has a weight, and changes no bit of any other window."""
    queries, pyramid, projections, grid = make(side=3, window=4, dims=(5, 6), dtype=torch.float16)
    with torch.no_grad():
        clean = mine(queries, pyramid, projections, grid)[0, 0]
        # Row 5 of the finer map belongs to the second row of windows, row 0 of the coarser one to the first.
        for s, y, seen in ((0, 5, [3]), (1, 0, [0])):
            spoilt = [level.clone() for level in pyramid]
            spoilt[s][0, y, 0, -1] = bad
            out = mine(queries, spoilt, projections, grid)[0, 0]
            others = [i for i in range(9) if i not in seen]
            assert not out[seen].isfinite().any() and torch.equal(out[others], clean[others])


def gradients(function, inputs, upstream):
    queries, pyramid, projections, grid = inputs
    queries, *pyramid = (t.detach().clone().requires_grad_() for t in (queries, *pyramid))
    projections = [Projection(*(t.detach().clone().requires_grad_() for t in p)) for p in projections]
    out = function(queries, pyramid, projections, grid)
    leaves = [queries, *pyramid, *(t for projection in projections for t in projection)]
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@contextlib.contextmanager
def double_throughout():
    """Lets the reference's merge, which rounds to float32 as the original's does, compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@pytest.mark.parametrize("dtype, grid", [(torch.bfloat16, 2), (torch.float16, 1)], ids=str)
def test_gradients(dtype, grid):
    """To queries, maps and projections."""
    queries, pyramid, projections, grid = inputs = make(**WINDOWS, grid=grid, dtype=dtype)
    upstream = normal(1, *queries.shape)
    ours, plain = gradients(mine, inputs, upstream), gradients(plain_form, inputs, upstream)
    double = [Projection(*(t.detach().double() for t in p)) for p in projections]
    with double_throughout():
        exact = gradients(
            plain_form, (queries.double(), [level.double() for level in pyramid], double, grid), upstream.double()
        )
    for each in zip(ours, plain, exact):
        assert_accurate(*each)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2], ids=str)
def test_queries_in_float32(dtypes):
    queries, pyramid, projections, grid = make(2, window=4, dims=(8, 16))
    pyramid = [level.to(dtype) for level, dtype in zip(pyramid, dtypes)]
    with torch.no_grad():
        ours = mine(queries, pyramid, projections, grid)
        plain = plain_form(queries, [level.float() for level in pyramid], projections, grid)
        assert ours.dtype == torch.float32
        assert_accurate(ours, plain, oracle(queries, pyramid, projections, grid))


def test_layouts():
    """The bits are the same for maps whose elements lie in another order."""
    queries, pyramid, projections, grid = make(2, window=2, batch=2, dims=(6, 10), dtype=torch.float16)
    swapped = [level.transpose(1, 2).contiguous().transpose(1, 2) for level in pyramid]
    planes = [level.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for level in pyramid]
    with torch.no_grad():
        expected = mine(queries, pyramid, projections, grid)
        for layout in (swapped, planes):
            assert torch.equal(mine(queries, layout, projections, grid), expected)


def test_no_picture():
    queries, pyramid, projections, grid = make(2, batch=0, grid=2, dtype=torch.float16)
    queries.requires_grad_()
    out = mine(queries, pyramid, projections, grid)
    assert out.shape == queries.shape
    out.sum().backward()
    assert queries.grad.shape == queries.shape


def test_operators_keep_torchs_rules():
    queries, pyramid, _, grid = make(1, grid=2, window=2, dims=(3, 4), dim=7, dtype=torch.float16)
    pooled, statistics = ops.pool_windows(queries, pyramid, grid, "coarse")
    leaves, operators = [t.clone().requires_grad_() for t in (queries, *pyramid)], torch.ops.mg_fast
    torch.library.opcheck(operators.patch_mining.default, (leaves[0], leaves[1:], grid, "coarse"))
    grad = torch.randn_like(pooled)
    torch.library.opcheck(operators.patch_mining_backward.default, (grad, queries, pyramid, statistics, grid, "coarse"))


def test_one_graph_under_compile():
    torch._dynamo.reset()
    inputs = make(1, window=4, dims=(6, 10), dtype=torch.bfloat16)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mine, backend=counter, fullgraph=True, dynamic=False)
    upstream = normal(1, *inputs[0].shape)
    for ours, expected in zip(gradients(compiled, inputs, upstream), gradients(mine, inputs, upstream)):
        # What torch compiles around the operators may round once more or less.
        assert torch.allclose(ours, expected, rtol=0.02, atol=0.02)
    assert counter.frame_count == 1


# ---- which kernel runs


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU of compute capability 9.0 the two kernels change places")
def test_the_interpreter_runs_coarse_only_by_name():
    queries, pyramid, projections, grid = make(1, window=4, dims=(6, 10), dtype=torch.bfloat16)
    pooled = normal(0, 1, 1, 1, 16).bfloat16()
    means = {name: ops.pool_windows(pooled, pyramid, grid, name)[1][..., 1, :] for name in ("auto", "coarse", "fine")}
    # The means of the kernel on window pixels are less a number.
    assert torch.equal(means["auto"], means["fine"]) and not torch.allclose(means["coarse"], means["fine"])


def test_a_kernel_that_cannot_run_is_refused():
    queries, pyramid, projections, grid = make(1, window=4, dims=(6, 10))
    refused = "the kernel 'coarse' cannot run patch_mining: maps must be all float16 or all bfloat16, got torch.float32"
    with pytest.raises(BackendError, match=refused):
        mine(queries, pyramid, projections, grid)
    with pytest.raises(ValueError, match="kernel must be one of auto, coarse, fine, got 'course'"):
        mine(queries, pyramid, projections, grid, "course")
    queries, pyramid, projections, grid = make(1, window=12, grid=2, dims=(6,), dtype=torch.float16)
    with pytest.raises(BackendError, match="a window may span up to 16x16 coarse pixels, got 24x24"):
        mine(queries, pyramid, projections, grid)
