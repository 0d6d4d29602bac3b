"""The interpreted kernels of deformable_attention agree with float64, and keep what else a caller may rely on."""

import contextlib
import importlib
import math
import mmap

import pytest
import torch
import torch._dynamo.testing

from bench.cases.settings import deterministic
from mg_fast import BackendError, ops
from mg_fast.testing.tolerances import assert_accurate
from tests import draws
from tests.interpreting import INTERPRETED
from tests.ops.deformable_attention import test_deformable_attention as shared
from tests.ops.deformable_attention.test_deformable_attention import (
    DTYPES,
    SHAPES,
    exact,
    gradients,
    layouts,
    make,
    plain,
)
from tests.waiting import no_waiting


def kernel(*inputs):
    return ops.deformable_attention(*inputs, backend="triton")


def by_sorting(inputs, upstream):
    with deterministic():
        return gradients(kernel, inputs, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    inputs = make(*shape, dtype=dtype)
    ours = kernel(*inputs)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(*inputs), exact(*inputs))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 2, 8, 2, [(2, 3), (1, 2)]), (2, 1, 33, 2, [(3, 2)]), (3, 1, 64, 3, [(2, 2)]), (1, 1, 5, 1, [(1, 1)] * 8)],
    ids=str,
)
def test_gradients(shape, dtype):
    """By atomics and by sorting."""
    inputs = make(*shape, dtype=dtype)
    upstream = draws.normal(1, 2, shape[0], shape[1] * shape[2]).to(dtype)
    base, oracle = (gradients(call, inputs, upstream) for call in (plain, exact))
    for found in (gradients(kernel, inputs, upstream), by_sorting(inputs, upstream)):
        for ours, simple, right, given in zip(found, base, oracle, (inputs[0], *inputs[2:])):
            assert ours.dtype == given.dtype and ours.shape == given.shape
            assert_accurate(ours, simple, right, rows=20)


def test_borders_are_those_of_the_definition():
    levels = [(3, 4), (1, 1)]
    value, *_ = make(3, 1, 4, 9, levels, batch=1)
    locations = shared.borders(levels).contiguous()
    weights = draws.normal(1, *locations.shape[:-1])
    expected = shared.by_hand(value, levels, locations, weights)
    torch.testing.assert_close(kernel(value, levels, locations, weights).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_seen_where_it_belongs():
    shared.what_is_not_finite_is_seen_where_it_belongs("triton")


@pytest.mark.parametrize("sorting", [False, True])
def test_a_location_that_is_not_finite_has_no_gradient(sorting):
    with deterministic() if sorting else contextlib.nullcontext():
        shared.a_location_that_is_not_finite_has_no_gradient("triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_of_a_gradient_reaches_what_its_query_reads():
    value, levels, locations, weights = make(2, 1, 8, 1, [(2, 3)], batch=1)
    # The first query reads the pixel in the lower right corner, the second one lies outside.
    locations[0, 0] = torch.tensor([0.99, 0.99])
    locations[0, 1] = 3.0
    upstream = torch.full((1, 2, 8), math.nan)
    for found in (gradients(kernel, (value, levels, locations, weights), upstream),):
        assert found[0].isnan().all(-1)[0, :, 0].tolist() == [False] * 5 + [True]
        assert found[1][0, 0].isnan().all() and not found[1][0, 1].any()
    with deterministic():
        again = gradients(kernel, (value, levels, locations, weights), upstream)
    assert torch.equal(again[0].isnan(), found[0].isnan())


def test_layouts():
    value, levels, locations, weights = make(2, 2, 4, 2, [(2, 2)])
    upstream = draws.normal(1, 2, 2, 8)
    expected = kernel(value, levels, locations, weights)
    others = gradients(kernel, (value, levels, locations, weights), upstream)
    for name, layout in layouts(value).items():
        assert torch.equal(kernel(layout, levels, locations, weights), expected), name
        for ours, same in zip(gradients(kernel, (layout, levels, locations, weights), upstream), others):
            torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-6, msg=name)
    one = value[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        kernel(one, levels, locations, weights), kernel(one.contiguous(), levels, locations, weights)
    )
    apart = [torch.stack([t, t * math.nan], -1)[..., 0] for t in (locations, weights)]
    assert not any(t.is_contiguous() for t in apart) and torch.equal(kernel(value, levels, *apart), expected)


def test_mixed_dtypes():
    """Locations and weights may have any floating dtype; the gradients have the dtypes of their inputs."""
    value, levels, locations, weights = make(3, 1, 8, 2, batch=1, dtype=torch.bfloat16)
    inputs = value, levels, locations.half(), weights.double()
    assert_accurate(kernel(*inputs), plain(*inputs), exact(*inputs))
    upstream = draws.normal(1, 1, 3, 8).bfloat16()
    for found in (gradients(kernel, inputs, upstream), by_sorting(inputs, upstream)):
        assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.float16, torch.float64]
        for ours, right in zip(found, gradients(exact, inputs, upstream)):
            assert_accurate(
                ours.to(torch.promote_types(ours.dtype, torch.bfloat16)).bfloat16(), right.bfloat16(), right
            )


@pytest.mark.parametrize("sizes", [dict(batch=0), dict(queries=0), dict(points=0)], ids=str)
@pytest.mark.parametrize("sorting", [False, True])
def test_nothing_to_sample(sizes, sorting):
    value, levels, locations, weights = make(**sizes)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    with deterministic() if sorting else contextlib.nullcontext():
        out = kernel(leaves[0], levels, leaves[1], leaves[2])
        assert out.shape == (len(value), locations.shape[1], 16) and not out.any()
        out.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in leaves)


@pytest.mark.parametrize("sorting", [False, True])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_wanted_has_a_gradient(wanted, sorting):
    value, levels, locations, weights = make(2, 1, 4, 2, batch=1)
    leaves = [value, locations, weights]
    upstream = draws.normal(1, 1, 2, 4)
    expected = gradients(kernel, (value, levels, locations, weights), upstream)[wanted]
    leaves[wanted].requires_grad_()
    with deterministic() if sorting else contextlib.nullcontext():
        kernel(leaves[0], levels, leaves[1], leaves[2]).backward(upstream)
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-5, atol=1e-6)
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


def test_deterministic_algorithms_use_no_atomics(monkeypatch):
    """The gradient of value comes from the kernel that sums sorted rows, and the other kernel is not asked for it."""
    asked = []
    module = importlib.import_module("mg_fast.ops.deformable_attention")
    original = module.deformable_attention_backward

    def spy(*arguments):
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(module, "deformable_attention_backward", spy)
    inputs, upstream = make(2, 1, 4, 2), draws.normal(1, 2, 2, 4)
    first, second = by_sorting(inputs, upstream), by_sorting(inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    gradients(kernel, inputs, upstream)
    assert asked == [[False, True, True]] * 2 + [[True, True, True]]


def test_a_second_derivative_is_refused():
    value, levels, locations, weights = make(1, 1, 4, 1)
    value.requires_grad_()
    weights.requires_grad_()
    out = kernel(value, levels, locations, weights)
    (first,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@pytest.mark.parametrize("sorting", [False, True])
def test_nothing_waits_for_the_device(sorting):
    """No step asks for a number, as it must not while a CUDA graph is captured."""
    inputs, upstream = make(1, 1, 4, 1), draws.normal(1, 2, 1, 4)
    expected = gradients(kernel, inputs, upstream)
    # The interpreter itself reads the memory of tensors in ways that are not refused.
    with deterministic() if sorting else contextlib.nullcontext(), no_waiting():
        found = gradients(kernel, inputs, upstream)
    for ours, same in zip(found, expected):
        torch.testing.assert_close(ours, same)


@pytest.mark.skipif(not INTERPRETED, reason="reads memory that is reserved and not there, which only a CPU can")
def test_offsets_of_more_than_31_bits():
    """The last of three pixels lies more than 2^31 elements behind the first one."""
    stride = 2**30 + 16
    # Pages that are not touched take no memory.
    memory = mmap.mmap(-1, 2 * (2 * stride + 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 3, 1, 16), (0, stride, 16, 1))
    near, levels, locations, weights = make(2, 1, 16, 2, [(1, 3)], batch=1, dtype=torch.float16)
    far.copy_(near)
    assert torch.equal(kernel(far, levels, locations, weights), kernel(near, levels, locations, weights))
    # A leaf would be a copy of all of the memory, so the gradients of the others are compared.
    found = []
    for value in (far, near):
        leaves = [tensor.clone().requires_grad_() for tensor in (locations, weights)]
        kernel(value, levels, *leaves).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(ours, same) for ours, same in zip(*found)) and found[0][0].any()


def test_operators_keep_torchs_rules():
    value, levels, locations, weights = make(2, 1, 4, 2)
    sides = [side for size in levels for side in size]
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    operators = torch.ops.mg_fast
    torch.library.opcheck(operators.deformable_attention.default, (leaves[0], sides, leaves[1], leaves[2]))
    grad = draws.normal(1, 2, 2, 4)
    for wanted in ([True, True, True], [True, False, True]):
        torch.library.opcheck(
            operators.deformable_attention_backward.default, (grad, value, sides, locations, weights, wanted)
        )
    rows = 2 * value.shape[1]
    order, ends = torch.arange(4 * weights.numel()), torch.linspace(0, 4 * weights.numel(), rows + 1).long()
    torch.library.opcheck(
        operators.deformable_attention_sum.default, (grad, sides, locations, weights, order, ends, torch.float16)
    )


@pytest.mark.parametrize("sorting", [False, True])
def test_one_graph_for_all_sizes_under_compile(sorting):
    """Pictures of other sizes, and other numbers of queries, take the graph that is there."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernel, backend=counter, fullgraph=True, dynamic=True)
    with deterministic() if sorting else contextlib.nullcontext():
        # Sizes that are equal by chance would be taken for one number.
        for queries, levels in ((3, [(4, 6), (7, 1)]), (5, [(9, 8), (10, 11)])):
            inputs, upstream = make(queries, 1, 16, 2, levels, batch=1), draws.normal(1, 1, queries, 16)
            for ours, same in zip(gradients(compiled, inputs, upstream), gradients(kernel, inputs, upstream)):
                torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    inputs = make(dtype=dtype)
    expected = kernel(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = kernel(*inputs)
    assert ours.dtype == dtype and torch.equal(ours, expected)


def test_what_the_kernel_does_not_take():
    value, levels, locations, weights = make(1, 1, 4, 1)
    with pytest.raises(BackendError, match="takes values in float16, bfloat16 and float32, got torch.float64"):
        kernel(value.double(), levels, locations, weights)
    with pytest.raises(BackendError, match="holds pixels of up to 256 channels a head, these have 257"):
        kernel(*make(1, 1, 257, 1))
    with pytest.raises(BackendError, match="is compiled for up to 8 levels, these are 9"):
        kernel(*make(1, 1, 4, 1, [(1, 1)] * 9))
    long = torch.zeros(1, 1, 1, 1).expand(1, 2**24 + 1, 1, 1)
    with pytest.raises(BackendError, match=r"in float32, up to 16777216, got \[\(1, 16777217\)\]"):
        kernel(long, [(1, 2**24 + 1)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
