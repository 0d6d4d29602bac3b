"""The interpreted pointwise kernels agree with the float64 oracle, and keep what else a caller may rely on."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mg_fast import BackendError, ops, use_backend
from mg_fast.kernels import pointwise
from mg_fast.kernels.configs import ProductTile, pointwise_bucket
from mg_fast.ops.custom_op_support import on_device
from mg_fast.testing.tolerances import assert_accurate
from tests.ops.pointwise.test_pointwise import DTYPES, OPERATIONS, gradients, make, oracle, plain


def kernel(operation, *inputs):
    return getattr(ops, operation)(*inputs, backend="triton")


def assert_accurate_without_gradients(operation, inputs):
    with torch.no_grad():
        ours, exact = kernel(operation, *inputs), oracle(operation, *inputs)
        assert ours.dtype == inputs[0].dtype and ours.shape == exact.shape and ours.is_contiguous()
        assert_accurate(ours, plain(operation, *inputs), exact)


@pytest.fixture
def small_tiles(monkeypatch):
    """Small tiles, so that a few rows need many programs, in groups of which the last one is lower."""
    monkeypatch.setattr(pointwise, "pointwise_tile", lambda *_, **__: ProductTile(16, 16, 16, 3, 4, 2))


# (rows, outputs, inputs), and the bucket of the tile.
SHAPES = {
    "one element": ((1, 1, 1), "narrow"),
    "primes": ((97, 131, 37), "narrow"),
    "a map of two pictures": (((2, 6, 5), 24, 8), "narrow"),
    "whole tiles": ((128, 64, 64), "few"),
    "one row more, a depth that no block divides": ((129, 80, 48), "few"),
    "rows of stage 0": ((70, 768, 192), "few"),
    "and back": ((70, 192, 768), "few"),
    "rows of stage 3, back": ((16, 16, 6144), "few"),
    "some tiles": ((8300, 16, 16), "some"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_accuracy(operation, shape, dtype):
    (m, n, k), bucket = SHAPES[shape]
    if isinstance(m, int):
        assert pointwise_bucket(dtype.itemsize, m, n, [n, k]) == (dtype.itemsize, bucket)
    assert_accurate_without_gradients(operation, make(operation, m, n, k, dtype=dtype))


def test_sizes_of_products():
    assert [pointwise_bucket(2, 2304, n, [n, 768]) for n in (256, 768, 1024)] == [(2, "few"), (2, "some"), (2, "many")]


@triton.jit
def gelu_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_y = pointwise.gelu_of_16_bits(tl.load(x_ptr + o).to(tl.float32))
    tl.store(out_ptr + o, b_y.to(out_ptr.dtype.element_ty))


def gelu(x, dtype):
    out = torch.empty_like(x, dtype=dtype)
    with on_device(x):
        gelu_kernel[(len(x) // 4096,)](x, out, BLOCK=4096)
    return out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gelu_of_every_bfloat16():
    """Every single number is right, so that the rule holds for any tensor of them."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # torch's GELU adds erf to one, which leaves nothing of small results, in float64 from -8 on.
    exact, wide = x.double() * torch.special.erfc(-x.double() / math.sqrt(2)) / 2, gelu(x, torch.float32)
    # Minus infinity times zero is NaN, as in torch.
    assert torch.equal(wide.isnan(), x.isnan() | (x == -math.inf)) and (wide[x == math.inf] == math.inf).all()
    # Below -13 the exact result is smaller than any normal number.
    normal = x.isfinite() & (exact.abs() > 1e-37)
    assert ((wide - exact).abs() <= 6.2e-5 * exact.abs())[normal].all()
    rounded = gelu(x, torch.bfloat16)
    assert ((rounded - exact).abs() <= 1.02 * 2**-8 * exact.abs())[normal & (exact.abs() < 3e38)].all()


@pytest.mark.parametrize("m, n", [(16, 16), (15, 17), (16 * 3, 16 * 2), (16 * 7 + 1, 16 * 5 - 1), (1, 90), (90, 1)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_program_has_a_tile_of_its_own(operation, m, n, small_tiles):
    """Every program writes its own tile; elements that no program writes would be NaN."""
    assert_accurate_without_gradients(operation, make(operation, m, n, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_common_offset(operation, dtype, small_tiles):
    inputs = make(operation, 20, 24, 70, dtype=dtype)
    assert_accurate_without_gradients(operation, [inputs[0] + 1000, *inputs[1:]])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_near_the_largest_of_float16(operation, small_tiles):
    """Results within float16 are right although partial sums are beyond float16."""
    x, weight, bias, *residual = make(operation, 20, 24, 64, dtype=torch.float16)
    x = torch.cat([x[:, :32], -x[:, :32]], dim=1).sign() * 6e4
    weight = weight.sign()
    weight[:, 32:] = weight[:, :32]
    inputs = [x, weight, bias, *residual]
    assert (x[:, :32].float() @ weight[:, :32].float().T).abs().max() > torch.finfo(torch.float16).max
    with torch.no_grad():
        ours, exact = kernel(operation, *inputs), oracle(operation, *inputs)
    assert ours.isfinite().all()
    assert_accurate(ours, exact.half(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_rounded_once(dtype, small_tiles):
    """The kernel rounds only the last result, and its GELU is the exact one.

    The library rounds the product first, and then GELU of the rounded product.
    """
    inputs = make("linear_gelu", 33, 40, 50, dtype=dtype)
    exact = oracle("linear_gelu", *inputs)
    tanh = F.gelu(F.linear(*(t.double() for t in inputs)), approximate="tanh")
    error = (kernel("linear_gelu", *inputs) - exact).abs()
    assert (error <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    assert (tanh - exact).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_finite_is_seen_where_it_belongs(operation, bad, dtype, small_tiles):
    inputs = make(operation, 37, 35, 20, dtype=dtype)
    clean = kernel(operation, *inputs)
    for at, place, spoilt in [
        (0, (20, 3), (20, slice(None))),
        (1, (18, 19), (slice(None), 18)),
        (2, (34,), (slice(None), 34)),
    ]:
        bads = [t.clone() for t in inputs]
        bads[at][place] = bad
        out = kernel(operation, *bads)
        seen = torch.zeros(out.shape, dtype=torch.bool)
        seen[spoilt] = True
        assert not out[seen].isfinite().any()
        assert torch.equal(out[~seen], clean[~seen])


def within(tensor, dim):
    """A slice of a wider tensor, whose other elements would be noticed if they were read."""
    noise = torch.full_like(tensor, float("nan"))
    return torch.cat([noise, tensor, noise], dim=dim).narrow(dim, tensor.shape[dim], tensor.shape[dim])


LAYOUTS = {
    "channels of a wider map": lambda t: within(t, -1),
    "rows of a taller map": lambda t: within(t, -2),
    "pixels of a wider map": lambda t: within(t, 1),
    "channels first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "every other channel": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_strides(operation, dtype, small_tiles):
    """The bits are the same for every layout."""
    inputs = make(operation, (2, 5, 4), 18, 22, dtype=dtype)
    expected = kernel(operation, *inputs)
    for name, layout in LAYOUTS.items():
        maps = {0, 3} & set(range(len(inputs)))
        for changed in [{at} for at in maps] + [maps]:
            arguments = [layout(t) if at in changed else t for at, t in enumerate(inputs)]
            assert not any(arguments[at].is_contiguous() for at in changed), name
            assert torch.equal(kernel(operation, *arguments), expected), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_weights_of_other_layouts_and_one_row_for_all(operation, small_tiles):
    x, weight, bias, *residual = make(operation, 19, 18, 22)
    arguments = [
        x[:1].expand(19, -1),
        weight.T.contiguous().T,
        bias[:1].expand(18),
        *(t[:1].expand(19, -1) for t in residual),
    ]
    assert not any(t.is_contiguous() for t in arguments)
    assert torch.equal(kernel(operation, *arguments), kernel(operation, *(t.contiguous() for t in arguments)))


@pytest.mark.parametrize("shape", [(0, 6, 7), ((0, 4, 4), 6, 7), ((3, 0, 4), 16, 16), (5, 0, 7), (5, 6, 0)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_multiply(operation, shape):
    inputs = make(operation, *shape)
    out, wanted = kernel(operation, *inputs), plain(operation, *inputs)
    assert out.shape == wanted.shape and torch.allclose(out, wanted, atol=1e-6)
    found = gradients(lambda *leaves: kernel(operation, *leaves), inputs, torch.ones_like(wanted))
    for gradient, expected in zip(
        found, gradients(lambda *leaves: plain(operation, *leaves), inputs, torch.ones_like(wanted))
    ):
        assert gradient.shape == expected.shape and torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_single_row_without_a_batch(operation):
    inputs = make(operation, (), 6, 7)
    out = kernel(operation, *inputs)
    assert out.shape == (6,) and torch.allclose(out, plain(operation, *inputs), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients(operation, dtype, small_tiles):
    inputs = make(operation, (2, 3, 5), 24, 40, dtype=dtype)
    upstream = torch.randn((2, 3, 5, 24), generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = gradients(lambda *leaves: kernel(operation, *leaves), inputs, upstream)
    simple = gradients(lambda *leaves: plain(operation, *leaves), inputs, upstream)
    exact = gradients(lambda *leaves: plain(operation, *leaves), [t.double() for t in inputs], upstream.double())
    # A value of a map is of one row; a value of a parameter's gradient is the sum over all rows.
    for gradient, other, wanted, rows in zip(ours, simple, exact, [1, 30, 30, 1]):
        assert gradient.dtype == dtype
        assert_accurate(gradient, other, wanted, rows=rows)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_gradients_that_nobody_wants_are_none(wanted, small_tiles):
    for operation in OPERATIONS:
        inputs = make(operation)
        if wanted < len(inputs):
            inputs[wanted].requires_grad_()
            kernel(operation, *inputs).sum().backward()
            assert [t.grad is not None for t in inputs] == [at == wanted for at in range(len(inputs))]


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)]
)
def test_residual_of_another_dtype(dtypes, small_tiles):
    inputs = make("linear_residual", 20, 18, 22)
    inputs = [*(t.to(dtypes[0]) for t in inputs[:3]), inputs[3].to(dtypes[1])]
    ours = kernel("linear_residual", *inputs)
    assert ours.dtype == torch.float32
    assert_accurate(ours, plain("linear_residual", *inputs), oracle("linear_residual", *inputs))
    upstream = torch.ones_like(ours)
    for gradient, t in zip(gradients(lambda *leaves: kernel("linear_residual", *leaves), inputs, upstream), inputs):
        assert gradient.dtype == t.dtype


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast(operation, residual, small_tiles):
    inputs = make(operation, 20, 18, 22)
    inputs[3:] = [t.to(residual) for t in inputs[3:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, wanted = kernel(operation, *inputs), plain(operation, *inputs)
    assert ours.dtype == wanted.dtype
    assert_accurate(ours, wanted, oracle(operation, *inputs))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_keep_torchs_rules(operation, small_tiles):
    operator = getattr(torch.ops.mg_fast, operation).default
    inputs = make(operation)
    torch.library.opcheck(operator, tuple(t.clone().requires_grad_() for t in inputs))
    torch.library.opcheck(operator, tuple(t.half() for t in inputs))
    torch.library.opcheck(operator, tuple(t.t().contiguous().t() for t in inputs))
    torch.library.opcheck(operator, tuple(make(operation, 0)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_graph_under_compile(operation, small_tiles):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: kernel(operation, *inputs), backend=counter, fullgraph=True, dynamic=True)
    for rows in ((2, 3, 5), (3, 4, 2)):
        inputs = make(operation, rows, 18, 22)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), kernel(operation, *inputs))
        upstream = torch.randn((*rows, 18), generator=torch.Generator().manual_seed(1))
        expected = gradients(lambda *leaves: kernel(operation, *leaves), inputs, upstream)
        for ours, wanted in zip(gradients(compiled, inputs, upstream), expected):
            assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    # There is one graph without gradients, and one with them.
    assert counter.frame_count == 2


def test_choosing_the_backend(monkeypatch):
    monkeypatch.delenv("MG_FAST_BACKEND", raising=False)
    runs = []
    for operation in OPERATIONS:
        launcher = getattr(pointwise, f"{operation}_fwd")
        monkeypatch.setattr(
            pointwise, f"{operation}_fwd", lambda *inputs, launcher=launcher: runs.append(1) or launcher(*inputs)
        )
        inputs = make(operation)
        getattr(ops, operation)(*inputs)
        assert not runs
        with use_backend("triton"):
            getattr(ops, operation)(*inputs)
            assert len(runs) == 1
            getattr(ops, operation)(*inputs, backend="torch")
        assert len(runs) == 1
        runs.clear()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtypes_that_the_kernels_do_not_take(operation):
    for at in range(3, len(make(operation))):
        inputs = make(operation)
        inputs[at] = inputs[at].double()
        with pytest.raises(
            BackendError,
            match=f"cannot run {operation}: the kernel takes float16, bfloat16 and float32, got torch.float64",
        ):
            kernel(operation, *inputs)
    with pytest.raises(BackendError, match="the kernel takes float16, bfloat16 and float32, got torch.float64"):
        kernel(operation, *make(operation, dtype=torch.float64))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_interpreter_needs_operands_widened(operation, monkeypatch, small_tiles):
    """Without WIDEN the interpreter's results are wrong. When this test fails, WIDEN may go."""
    inputs = make(operation, dtype=torch.bfloat16)
    exact = oracle(operation, *inputs)
    launch = pointwise._launch

    def unwidened(*matrices):
        programs, arguments = launch(*matrices)
        return programs, arguments | {"WIDEN": False}

    monkeypatch.setattr(pointwise, "_launch", unwidened)
    assert not torch.allclose(kernel(operation, *inputs).double(), exact, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, small_tiles):
    """In place the result is right with many programs, because each writes only elements that it alone has read."""
    inputs = make("linear_residual", 50, 40, 33, dtype=dtype)
    with torch.no_grad():
        exact, residual = oracle("linear_residual", *inputs), inputs[3].clone()
        assert ops.linear_residual_(*inputs[:3], residual, backend="triton") is residual
        assert_accurate(residual, plain("linear_residual", *inputs), exact)
        assert torch.equal(residual, kernel("linear_residual", *inputs))
