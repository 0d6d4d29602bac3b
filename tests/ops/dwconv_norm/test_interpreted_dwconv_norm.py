"""The interpreted kernel of dwconv_norm agrees with the float64 oracle, and keeps what else a caller may rely on."""

import math

import pytest
import torch
import torch._dynamo.testing

from mg_fast import BackendError, ops
from mg_fast.kernels.configs import DWCONV_NORM, BandsTile, dwconv_in_bands, replaced_tile
from mg_fast.testing.tolerances import assert_accurate
from tests.ops.dwconv_norm.test_dwconv_norm import DTYPES, exact, gradients, layouts, make, plain

# (B, H, W, C): one pixel, fewer rows and columns than taps, odd sides, tiles that end early, full and partial chunks of
# channels, and every bucket.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 1, 32),
    (1, 2, 3, 8),
    (2, 7, 5, 6),
    (1, 9, 17, 24),
    (1, 4, 16, 96),
    (1, 13, 11, 37),
    (2, 5, 9, 192),
    (1, 5, 6, 131),
    (1, 5, 5, 384),
    (1, 3, 3, 250),
    (1, 5, 3, 768),
    (1, 3, 3, 515),
    (1, 2, 2, 1536),
    (1, 2, 2, 1001),
    (1, 5, 2, 3072),
    (1, 1, 2, 3071),
]


def kernel(*inputs, eps=1e-6):
    return ops.dwconv_norm(*inputs, eps, backend="triton")


def assert_kernel_accurate(inputs, eps=1e-6):
    ours = kernel(*inputs, eps=eps)
    assert ours.dtype == inputs[0].dtype and ours.shape == inputs[0].shape and ours.is_contiguous()
    assert_accurate(ours, plain(*inputs, eps=eps), exact(*inputs, eps=eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    assert_kernel_accurate(make(shape, dtype))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_eps(eps):
    assert_kernel_accurate(make((1, 5, 6, 16), scale=1e-2), eps)


# Loads of 48 channels are wide, and in 16 bits such maps are convolved on tensor cores.
@pytest.mark.parametrize("channels", [40, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_common_offset(dtype, channels):
    """The variance does not drown where the mean of the features is fifty times their spread."""
    assert_kernel_accurate(make((1, 9, 6, channels), dtype, offset=50.0))


@pytest.mark.parametrize("channels", [40, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_bias(dtype, channels):
    """The variance does not drown in a large bias, which is common to all channels after the convolution."""
    x, weight, bias, *norm = make((1, 9, 6, channels), dtype)
    assert_kernel_accurate([x, weight, bias + 200, *norm])


@pytest.mark.parametrize("channels", [40, 48])
def test_features_near_the_largest_of_float16(channels):
    x, weight, *vectors = make((1, 9, 6, channels), torch.float16)
    x, rest = x * (6e4 / x.abs().max()), (16 * weight, *vectors)
    ours = kernel(x, *rest)
    # The plain form overflows in float16, so the result is compared with the plain form in float32.
    wide = [tensor.float() for tensor in (x, *rest)]
    assert not plain(x, *rest).isfinite().all() and ours.isfinite().all()
    assert_accurate(ours, plain(*wide), exact(x, *rest))


def test_pixels_outside_are_zero_exactly():
    """With a map of ones and weights of ones, the result counts the taps inside the map."""
    h, w, c = 9, 8, 16
    one = torch.ones(c)
    x, gain = torch.ones(1, h, w, c), torch.arange(c) / c
    bias = torch.linspace(-1, 1, c)
    ours = kernel(x, torch.ones(49, c) * gain, bias, one, one * 0, eps=0.0)
    inside = [[(min(y + 4, h) - max(y - 3, 0)) * (min(v + 4, w) - max(v - 3, 0)) for v in range(w)] for y in range(h)]
    z = torch.tensor(inside).double()[..., None] * gain.double() + bias.double()
    expected = (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, correction=0)
    assert torch.allclose(ours[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(dtype):
    """The result is the same for every layout, up to the order of sums.

    Where loads are narrow, another tile adds up the channels of a pixel in another order.
    """
    x, *rest = make((2, 5, 6, 16), dtype)
    expected = kernel(x, *rest)
    for name, layout in layouts(x).items():
        assert torch.allclose(kernel(layout, *rest), expected, rtol=4 * torch.finfo(dtype).eps, atol=2e-6), name


def test_parameters_of_any_layout():
    x, weight, *vectors = make((1, 5, 6, 16))
    spread = [torch.stack([v, v * math.nan], 1)[:, 0] for v in vectors]
    assert not any(v.is_contiguous() for v in spread)
    assert torch.equal(kernel(x, weight.t().contiguous().t(), *spread), kernel(x, weight, *vectors))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [(0, 0), (5, 4), (10, 11)], ids=str)
def test_what_is_not_finite_is_seen_where_it_belongs(at, bad):
    x, *rest = make((2, 11, 12, 20))
    clean = kernel(x, *rest)
    x[1, at[0], at[1], 3] = bad
    out = kernel(x, *rest)
    seen = torch.zeros(x.shape[:3], dtype=torch.bool)
    seen[1, max(at[0] - 3, 0) : at[0] + 4, max(at[1] - 3, 0) : at[1] + 4] = True
    assert not out[seen].isfinite().any() and torch.equal(out[~seen], clean[~seen])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_reaches_one_pixel_farther_on_tensor_cores(dtype, bad):
    x, *rest = make((1, 12, 13, 16), dtype)
    clean = kernel(x, *rest)
    x[0, 5, 6, 3] = bad
    out = kernel(x, *rest)
    assert not out[0, 2:9, 3:10].isfinite().any()
    farther = torch.zeros(x.shape[:3], dtype=torch.bool)
    farther[0, 1:10, 2:11] = True
    assert torch.equal(out[~farther], clean[~farther])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_several_tiles_on_tensor_cores(dtype):
    assert_kernel_accurate(make((2, 26, 18, 16), dtype))


@pytest.mark.parametrize("tile", [(2, 8, 8, 4), (4, 32, 4, 8), (6, 16, 2, 2)], ids=str)
def test_other_tiles_on_tensor_cores(tile):
    """The tuner tries tiles with other rows, columns, channels and warps; some end within the map or its channels."""
    inputs = make((2, 9, 11, 48), torch.bfloat16)
    expected = kernel(*inputs)
    with replaced_tile(DWCONV_NORM, None, (768, "bands"), BandsTile(*tile)):
        assert torch.equal(kernel(*inputs), expected)


def test_maps_that_tensor_cores_convolve():
    for shape, dtype, stride, expected in [
        ((1, 5, 6, 32), torch.bfloat16, 32, True),
        ((1, 5, 6, 32), torch.float16, 32, True),
        ((1, 5, 6, 32), torch.float32, 32, False),
        ((1, 5, 6, 24), torch.bfloat16, 24, False),
        ((1, 5, 6, 32), torch.bfloat16, 40, False),
    ]:
        x = torch.empty(*shape[:3], stride, dtype=dtype)[..., : shape[3]]
        assert dwconv_in_bands(x.itemsize, shape[3], x.stride()[:3]) is expected


def test_no_picture():
    inputs = [tensor.requires_grad_() for tensor in make((0, 5, 6, 8))]
    out = kernel(*inputs)
    assert out.shape == (0, 5, 6, 8)
    out.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    inputs = make((2, 5, 6, 7), dtype)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = gradients("reference", [tensor.double() for tensor in inputs], upstream)
    for ours, base, oracle in zip(
        gradients("triton", inputs, upstream), gradients("reference", inputs, upstream), wanted
    ):
        assert ours.dtype == dtype
        assert_accurate(ours, base, oracle, rows=60)


def test_gradient_of_a_published_weight():
    """The gradient flows through the packing of the weight."""
    x, weight, *vectors = make((1, 5, 6, 8))
    published = weight.t().reshape(8, 1, 7, 7).clone().requires_grad_()
    kernel(x, published.reshape(8, 49).t(), *vectors).square().sum().backward()
    packed = weight.clone().requires_grad_()
    kernel(x, packed, *vectors).square().sum().backward()
    assert torch.allclose(published.grad.reshape(8, 49).t(), packed.grad, rtol=1e-5, atol=1e-6)


def test_only_what_is_wanted_has_a_gradient():
    x, weight, *vectors = make((1, 5, 6, 8))
    weight.requires_grad_()
    kernel(x, weight, *vectors).square().sum().backward()
    assert weight.grad.any() and x.grad is None and all(v.grad is None for v in vectors)


def test_operators_keep_torchs_rules():
    inputs = make((2, 3, 4, 5))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.mg_fast.dwconv_norm.default, (*leaves, 1e-6))
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    wanted = [True, False, True, True, False]
    torch.library.opcheck(torch.ops.mg_fast.dwconv_norm_backward.default, (grad, inputs, wanted, 1e-6))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(given):
    """Autocast does not look into the operator, so its inputs are cast before, as for the convolution."""
    x, *weights = make((1, 5, 6, 24))
    with torch.autocast("cpu", torch.bfloat16):
        ours = kernel(x.to(given), *weights)
    cast = [tensor.bfloat16() for tensor in (x, *weights)]
    assert ours.dtype == torch.bfloat16
    assert_accurate(ours, plain(*cast), exact(*cast))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_graph_under_compile(backend):
    torch._dynamo.reset()
    inputs = make((1, 5, 6, 8))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *tensors: ops.dwconv_norm(*tensors, backend=backend), backend=counter, fullgraph=True
    )
    leaves, others = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    ours, expected = compiled(*leaves), ops.dwconv_norm(*others, backend=backend)
    assert torch.allclose(ours, expected, atol=1e-6) and counter.frame_count == 1
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), others)
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_does_not_take():
    with pytest.raises(
        BackendError, match="cannot run dwconv_norm: the kernel holds pixels of up to 3072 channels, these have 3073"
    ):
        kernel(*make((1, 1, 1, 3073)))
    with pytest.raises(BackendError, match="the kernel takes float16, bfloat16 and float32, got torch.float64"):
        kernel(*(tensor.double() for tensor in make((1, 1, 1, 4))))
