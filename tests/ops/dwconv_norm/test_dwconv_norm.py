"""dwconv_norm's PyTorch forms on the CPU agree with float64 and with timm's own block, and refuse what does not fit."""

import pytest
import torch

from mg_fast import BackendError, ops
from mg_fast.ops import reference
from mg_fast.testing.tolerances import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape=(2, 9, 13, 24), dtype=torch.float32, offset=0.0, scale=1.0, seed=0):
    """The arguments of `ops.dwconv_norm` without eps."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[-1]

    def normal(*size):
        return torch.randn(size, generator=generator)

    tensors = ((normal(*shape) + offset) * scale, normal(49, c) / 7, normal(c), 1 + 0.3 * normal(c), normal(c))
    return [tensor.to(dtype) for tensor in tensors]


def plain(*inputs, eps=1e-6):
    return ops.dwconv_norm(*inputs, eps, backend="reference")


def exact(*inputs, eps=1e-6):
    return plain(*(tensor.double() for tensor in inputs), eps=eps)


def by_hand(x, weight, bias, norm_weight, norm_bias, eps):
    """Computes dwconv_norm pixel by pixel and tap by tap."""
    b, h, w, _ = x.shape
    out = torch.empty_like(x)
    for i in range(b):
        for y in range(h):
            for column in range(w):
                z = bias.clone()
                for tap in range(49):
                    v, u = y + tap // 7 - 3, column + tap % 7 - 3
                    if 0 <= v < h and 0 <= u < w:
                        z += weight[tap] * x[i, v, u]
                d = z - z.mean()
                out[i, y, column] = d / (d.square().mean() + eps).sqrt() * norm_weight + norm_bias
    return out


def layouts(x):
    """The same map in other layouts."""
    noise = torch.full_like(x, float("nan"))
    return {
        "stored as NCHW": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "rows and columns swapped": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels of a wider map": torch.cat([noise, x, noise], 3).narrow(3, x.shape[3], x.shape[3]),
        "columns of a wider map": torch.cat([noise, x, noise], 2).narrow(2, x.shape[2], x.shape[2]),
        "rows of a taller map": torch.cat([noise, x, noise], 1).narrow(1, x.shape[1], x.shape[1]),
        "every other column": x.repeat_interleave(2, dim=2)[:, :, ::2],
    }


def gradients(backend, inputs, upstream, eps=1e-6):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(ops.dwconv_norm(*leaves, eps, backend=backend), leaves, upstream.to(inputs[0].dtype))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_reference_is_the_definition(eps):
    inputs = [tensor.double() for tensor in make((2, 5, 8, 6))]
    assert torch.allclose(plain(*inputs, eps=eps), by_hand(*inputs, eps), rtol=1e-12, atol=1e-12)


def test_reference_is_timms_own_block():
    from timm.models.convnext import ConvNeXtBlock

    block = ConvNeXtBlock(16).eval()
    x = torch.randn(2, 16, 9, 11, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block.norm(block.conv_dw(x).permute(0, 2, 3, 1))
        vectors = block.conv_dw.bias, block.norm.weight, block.norm.bias
        assert torch.equal(reference.dwconv_norm(x, block.conv_dw.weight, *vectors, block.norm.eps), expected)
        ours = ops.dwconv_norm(
            x.permute(0, 2, 3, 1), block.conv_dw.weight.reshape(16, 49).t(), *vectors, block.norm.eps
        )
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 13, 24), (1, 1, 1, 8), (1, 48, 48, 768), (3, 2, 17, 37)], ids=str)
def test_accuracy(shape, dtype):
    inputs = make(shape, dtype)
    ours = ops.dwconv_norm(*inputs, backend="torch")
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(*inputs), exact(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    x, *rest = make(dtype=dtype)
    expected = ops.dwconv_norm(x, *rest, backend="torch")
    for name, layout in layouts(x).items():
        assert torch.equal(ops.dwconv_norm(layout, *rest, backend="torch"), expected), name


def test_gradients():
    inputs = make((2, 5, 6, 7))
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients("reference", [tensor.double() for tensor in inputs], upstream)
    for ours, base, oracle in zip(
        gradients("torch", inputs, upstream), gradients("reference", inputs, upstream), wanted
    ):
        assert_accurate(ours, base, oracle, rows=60)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_picture(backend):
    inputs = make((0, 5, 6, 8))
    assert ops.dwconv_norm(*inputs, backend=backend).shape == (0, 5, 6, 8)


REFUSED = {
    "three dimensions": (
        0,
        lambda x: x[0],
        r"x must be \[B, H, W, C\] with at least one pixel and channel, got \[9, 13, 24\]",
    ),
    "no row": (0, lambda x: x[:, :0], r"at least one pixel and channel, got \[2, 0, 13, 24\]"),
    "integers": (0, lambda x: x.int(), "must be floating point, got torch.int32"),
    "published weight": (
        1,
        lambda w: w.t().reshape(24, 1, 7, 7),
        r"weight must be \[49, 24\], taps by channels, got \[24, 1, 7, 7\]",
    ),
    "narrow bias": (2, lambda t: t[1:], r"bias must be \[24\], got \[23\]"),
    "narrow norm": (4, lambda t: t[1:], r"norm_bias must be \[24\], got \[23\]"),
    "other dtype": (
        3,
        lambda t: t.half(),
        "norm_weight must be torch.float32 on cpu as x is, got torch.float16 on cpu",
    ),
    "other device": (
        1,
        lambda t: t.to("meta"),
        "weight must be torch.float32 on cpu as x is, got torch.float32 on meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case):
    at, change, message = REFUSED[case]
    inputs = make()
    inputs[at] = change(inputs[at])
    with pytest.raises(ValueError, match=f"dwconv_norm: .*{message}"):
        ops.dwconv_norm(*inputs)


def test_the_kernel_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run dwconv_norm: triton "):
        ops.dwconv_norm(*make(), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(given, backend):
    """Under autocast inputs are cast as for the convolution, and the result has the dtype that the next layer needs."""
    x, *weights = make()
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.dwconv_norm(x.to(given), *weights, backend=backend)
    assert ours.dtype == torch.bfloat16
    cast = [tensor.bfloat16() for tensor in (x, *weights)]
    assert_accurate(ours, plain(*cast), exact(*cast))
