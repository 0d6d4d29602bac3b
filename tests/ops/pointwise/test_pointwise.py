"""The pointwise layers in PyTorch agree with the float64 oracle, and refuse what does not fit with a clear message."""

import pytest
import torch
import torch.nn.functional as F

from mg_fast import BackendError, ops
from mg_fast.ops import backend, reference
from mg_fast.ops.torch.pointwise import linear
from mg_fast.testing.tolerances import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATIONS = ["linear_gelu", "linear_residual"]


def make(operation, m=5, n=6, k=7, dtype=torch.float32, seed=0):
    """Arguments whose results are of order one; `m` is a number of rows, or all sizes but the channels."""
    generator = torch.Generator().manual_seed(seed)
    leading = m if isinstance(m, tuple) else (m,)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator) for shape in ((*leading, k), (n, k), (n,), (*leading, n))
    )
    inputs = [x, weight * max(k, 1) ** -0.5, bias, residual][: 3 + (operation == "linear_residual")]
    return [t.to(dtype) for t in inputs]


def plain(operation, *inputs):
    return getattr(reference, operation)(*inputs)


def oracle(operation, *inputs):
    return plain(operation, *(t.double() for t in inputs))


def gradients(function, inputs, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


# (rows, outputs, inputs).
SHAPES = {
    "one element": (1, 1, 1),
    "primes": (97, 131, 37),
    "a map of two pictures": ((2, 6, 5), 24, 8),
    "no rows": (0, 6, 7),
    "no picture": ((0, 4, 4), 6, 7),
    # Widths of the stages 0 and 3 of ConvNeXt-L. With so many rows, stage 0 is a convolution on a CPU in float32; the
    # test of the published sizes has all stages with as many.
    "stage 0": (600, 768, 384),
    "stage 3": (40, 1536, 6144),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_accuracy(operation, shape, dtype):
    inputs = make(operation, *SHAPES[shape], dtype=dtype)
    with torch.no_grad():
        ours = getattr(ops, operation)(*inputs, backend="torch")
        exact = oracle(operation, *inputs)
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert_accurate(ours, plain(operation, *inputs), exact)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [192, 384, 768, 1536])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_accuracy_of_the_published_sizes(operation, channels):
    """Two threads are used, because with one torch does not take oneDNN's convolutions.

    The errors of these convolutions grow with the number of terms.
    """
    outputs, terms = (4 * channels, channels) if operation == "linear_gelu" else (channels, 4 * channels)
    inputs = make(operation, 600, outputs, terms)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            exact, simple = oracle(operation, *inputs), plain(operation, *inputs)
            assert_accurate(getattr(ops, operation)(*inputs, backend="torch"), simple, exact)
            assert_accurate(
                linear(*inputs[:3], precise=True), F.linear(*inputs[:3]), F.linear(*(t.double() for t in inputs[:3]))
            )
            if operation == "linear_residual":
                assert_accurate(ops.linear_residual_(*inputs[:3], inputs[3].clone(), backend="torch"), simple, exact)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_single_row_without_a_batch(operation):
    inputs = make(operation, (), 6, 7)
    for name in ("reference", "torch"):
        out = getattr(ops, operation)(*inputs, backend=name)
        assert out.shape == (6,)
        assert_accurate(out, plain(operation, *inputs), oracle(operation, *inputs))


@pytest.mark.parametrize("rows", [5, 600])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_stay_as_they_are(operation, rows):
    """Work in place is done only in memory of its own, with gradients and without."""
    inputs = make(operation, rows, 512, 512)
    before = [t.clone() for t in inputs]
    with torch.no_grad():
        expected = getattr(ops, operation)(*inputs, backend="torch")
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = gradients(lambda *leaves: getattr(ops, operation)(*leaves, backend="torch"), inputs, upstream)
    exact = gradients(lambda *leaves: plain(operation, *leaves), [t.double() for t in inputs], upstream.double())
    simple = gradients(lambda *leaves: plain(operation, *leaves), inputs, upstream)
    for gradient, wanted, other in zip(ours, exact, simple):
        assert_accurate(gradient, other, wanted, rows=rows)
    assert all(torch.equal(t, kept) for t, kept in zip(inputs, before))


def test_gelu_is_the_exact_one():
    """The tanh form would differ by up to 5e-4."""
    x = torch.linspace(-6, 6, 1001)[:, None]
    for name in ("reference", "torch"):
        ours = ops.linear_gelu(x, torch.ones(1, 1), torch.zeros(1), backend=name)
        assert (ours - F.gelu(x)).abs().max() < 1e-6 < (ours - F.gelu(x, approximate="tanh")).abs().max()


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)]
)
def test_residual_of_another_dtype(dtypes):
    inputs = make("linear_residual")
    inputs = [*(t.to(dtypes[0]) for t in inputs[:3]), inputs[3].to(dtypes[1])]
    for name in ("reference", "torch"):
        ours = ops.linear_residual(*inputs, backend=name)
        assert ours.dtype == torch.float32
        assert_accurate(ours, plain("linear_residual", *inputs), oracle("linear_residual", *inputs))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast(operation, residual):
    inputs = make(operation)
    inputs[3:] = [t.to(residual) for t in inputs[3:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, wanted = getattr(ops, operation)(*inputs, backend="torch"), plain(operation, *inputs)
    assert ours.dtype == wanted.dtype
    assert_accurate(ours, wanted, oracle(operation, *inputs))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_graph_under_compile(operation, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: getattr(ops, operation)(*inputs, backend=backend),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for rows in (5, 600):
        inputs = make(operation, rows, 512, 512)
        with torch.no_grad():
            assert torch.allclose(compiled(*inputs), plain(operation, *inputs), atol=1e-5)


def test_auto_takes_the_librarys_product_until_ours_is_measured():
    for operation in OPERATIONS:
        assert backend.choose(operation, "auto", "cuda") == "torch"
        assert backend.choose(operation, "triton", "cuda") == "triton"
        assert backend.choose(operation, "auto", "cpu") == "torch"


def changed(at, change, operation="linear_residual"):
    inputs = make(operation)
    inputs[at] = change(inputs[at])
    return lambda: getattr(ops, operation)(*inputs)


REFUSED = {
    "a number": (
        changed(0, lambda x: x[0, 0]),
        r"linear_residual: expected x \[..., K\] and weight \[N, K\], got \[\] and \[6, 7\]",
    ),
    "narrow x": (changed(0, lambda x: x[:, 1:], "linear_gelu"), r"linear_gelu: expected .* got \[5, 6\] and \[6, 7\]"),
    "convolution's weight": (changed(1, lambda w: w[:, :, None, None]), r"got \[5, 7\] and \[6, 7, 1, 1\]"),
    "short bias": (changed(2, lambda b: b[1:]), r"bias must be \[6\], got \[5\]"),
    "residual that would be broadcast": (changed(3, lambda r: r[:1]), r"residual must be \[5, 6\], got \[1, 6\]"),
    "other device": (changed(1, lambda w: w.to("meta")), "weight is on meta, x is on cpu"),
    "integers": (changed(3, lambda r: r.int()), "residual must be floating point, got torch.int32"),
    "other dtype": (changed(1, lambda w: w.half()), "weight must be torch.float32 as x is, got torch.float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_the_kernels_do_not_take(operation):
    inputs = [t.to("meta", torch.float64) for t in make(operation)]
    assert getattr(ops, operation)(*inputs).dtype == torch.float64
    with pytest.raises(BackendError, match=f"backend 'triton' cannot run {operation}: triton runs on CUDA tensors"):
        getattr(ops, operation)(*inputs, backend="triton")


def test_in_place_where_a_gradient_is_wanted():
    x, weight, bias, residual = make("linear_residual")
    with pytest.raises(ValueError, match="linear_residual_: a gradient is wanted, which needs what this overwrites"):
        ops.linear_residual_(x, weight.requires_grad_(), bias, residual)


def test_in_place_on_its_own_input():
    x, weight, bias, _ = make("linear_residual", m=4, n=7, k=7)
    with pytest.raises(ValueError, match="x and residual lie in the same memory"):
        ops.linear_residual_(x, weight, bias, x)


def test_in_place_on_a_residual_that_is_not_contiguous():
    x, weight, bias, residual = make("linear_residual")
    with pytest.raises(ValueError, match="expected a contiguous residual, got strides"):
        ops.linear_residual_(x, weight, bias, residual.t().contiguous().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 600])
def test_in_place(rows, dtype):
    inputs = make("linear_residual", m=rows, dtype=dtype)
    with torch.no_grad():
        expected, exact = plain("linear_residual", *inputs), oracle("linear_residual", *inputs)
        residual = inputs[3].clone()
        assert ops.linear_residual_(*inputs[:3], residual, backend="torch") is residual
        assert_accurate(residual, expected, exact)
