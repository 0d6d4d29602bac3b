"""deformable_attention's PyTorch forms on the CPU agree with float64, and refuse what does not fit."""

import math

import pytest
import torch

from mg_fast import BackendError, ops
from mg_fast.ops.deformable_attention import reference
from mg_fast.ops.torch import deformable_attention as torch_form
from mg_fast.testing.tolerances import assert_accurate
from tests import draws

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Queries, heads, channels, points, and levels: one pixel, maps of one row, the tile of 16 queries and one more, heads
# whose width allows no wide loads, and as many levels and points as the kernel takes.
SHAPES = [
    (1, 1, 1, 1, [(1, 1)]),
    (5, 2, 8, 4, [(4, 6), (2, 3)]),
    (17, 1, 32, 2, [(1, 7), (5, 1), (3, 3)]),
    (3, 3, 5, 3, [(6, 5)]),
    (2, 1, 33, 4, [(3, 4), (1, 1)]),
    (3, 1, 64, 8, [(4, 4), (2, 2)]),
    (2, 1, 16, 2, [(2, 3), (3, 2), (1, 2), (2, 1), (1, 1), (4, 1), (1, 4), (2, 2)]),
]


def make(queries=5, heads=2, channels=8, points=4, levels=((4, 6), (2, 3)), *, batch=2, dtype=torch.float32, seed=0):
    """The arguments of `ops.deformable_attention`; a third of the samples lies partly or wholly outside.

    No sample lies within a hundredth of a pixel's centre in either direction, because the derivative jumps there.
    """
    generator = torch.Generator().manual_seed(seed)
    value = draws.normal(generator, batch, sum(h * w for h, w in levels), heads, channels).to(dtype)
    sizes = torch.tensor([(w, h) for h, w in levels], dtype=torch.float32)[:, None]
    uniform = torch.rand((batch, queries, heads, len(levels), points, 2), generator=generator, device="cpu")
    pixels = (uniform * 1.4 - 0.2).to(sizes.device) * sizes
    away = pixels.floor() + (pixels - pixels.floor()).clamp(0.01, 0.99)
    weights = draws.normal(generator, batch, queries, heads, len(levels), points)
    return value, list(levels), (away + 0.5) / sizes, weights


def exact(value, levels, locations, weights):
    return reference(value.double(), levels, locations.double(), weights.double())


def plain(value, levels, locations, weights):
    """The reference in float32, rounded once: in 16 bits the original would also round locations and every sample."""
    return reference(value.float(), levels, locations.float(), weights.float()).to(value.dtype)


def gradients(call, inputs, upstream):
    """Gradients to value, locations and weights by a function of the four inputs."""
    value, levels, locations, weights = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    out = call(leaves[0], levels, leaves[1], leaves[2])
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def by_hand(value, levels, locations, weights):
    """Computes deformable_attention in float64, sample by sample and pixel by pixel."""
    value, locations, weights = value.double(), locations.double(), weights.double()
    batch, _, heads, channels = value.shape
    out = value.new_zeros(batch, locations.shape[1], heads, channels)
    for b, q, n, level, p in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape)).tolist():
        (h, w), start = levels[level], sum(h * w for h, w in levels[:level])
        x, y = (locations[b, q, n, level, p].tolist()[i] * (w, h)[i] - 0.5 for i in (0, 1))
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, n, level, p]
                    out[b, q, n] += share * value[b, start + row * w + column, n]
    return out.flatten(2)


def layouts(value):
    """The same values in other layouts."""
    noise = torch.full_like(value, math.nan)
    return {
        "heads first": value.transpose(1, 2).contiguous().transpose(1, 2),
        "pixels of a longer map": torch.cat([noise, value, noise], 1).narrow(1, value.shape[1], value.shape[1]),
        "heads of more": torch.cat([noise, value], 2).narrow(2, value.shape[2], value.shape[2]),
        "channels of more": torch.cat([value, noise], 3).narrow(3, 0, value.shape[3]),
        "channels apart": value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }


def borders(levels, queries=3, heads=1):
    """Locations on both sides of the borders of every level, and exactly there; some are not finite, or very large.

    Returns [1, queries, heads, L, 9, 2], in which every query has its own order of rows.
    """
    special = []
    for h, w in levels:
        x = [-0.5 / w, 1 + 0.5 / w, -0.49 / w, 1 + 0.49 / w, -0.51 / w, 1 + 0.51 / w, 0.5, 1e30, math.inf]
        y = [-0.5 / h, 1 + 0.5 / h, -0.49 / h, 1 + 0.49 / h, -0.51 / h, 1 + 0.51 / h, 0.5, -1e30, math.nan]
        special.append(torch.stack([torch.tensor(x), torch.tensor(y).roll(3)], -1))
    rows = torch.stack(special)
    found = torch.stack([torch.stack([rows[..., 0], rows[..., 1].roll(q, -1)], -1) for q in range(queries)])
    return found[None, :, None].expand(1, queries, heads, *found.shape[1:])


def test_reference_is_the_definition():
    value, levels, locations, weights = make(dtype=torch.float64)
    expected = by_hand(value, levels, locations, weights)
    torch.testing.assert_close(exact(value, levels, locations, weights), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_borders_are_those_of_the_definition(backend):
    borders_are_those_of_the_definition(backend)


def borders_are_those_of_the_definition(backend):
    levels = [(3, 4), (1, 1)]
    value, *_ = make(3, 1, 4, 9, levels, batch=1, dtype=torch.float64)
    locations = borders(levels).double()
    weights = draws.normal(1, *locations.shape[:-1]).double()
    ours = ops.deformable_attention(value, levels, locations, weights, backend=backend)
    torch.testing.assert_close(ours, by_hand(value, levels, locations, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    inputs = make(*shape, dtype=dtype)
    ours = ops.deformable_attention(*inputs, backend="torch")
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_accurate(ours, plain(*inputs), exact(*inputs))


def test_reference_in_16_bits_is_the_originals():
    """It has the dtype of values, and the rounding errors of the original, which casts the locations."""
    inputs = make(dtype=torch.bfloat16)
    ours = ops.deformable_attention(*inputs, backend="reference")
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact(*inputs)).abs().max() < 0.1 * exact(*inputs).abs().max()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layouts(backend):
    value, *rest = make()
    expected = ops.deformable_attention(value, *rest, backend=backend)
    for name, layout in layouts(value).items():
        torch.testing.assert_close(
            ops.deformable_attention(layout, *rest, backend=backend), expected, rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("sizes", [dict(batch=0), dict(queries=0), dict(points=0)], ids=str)
def test_nothing_to_sample(backend, sizes):
    value, levels, locations, weights = make(**sizes)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    out = ops.deformable_attention(leaves[0], levels, leaves[1], leaves[2], backend=backend)
    assert out.shape == (len(value), locations.shape[1], 16) and not out.any()
    out.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    inputs = make(dtype=dtype)
    upstream = draws.normal(1, 2, 5, 16).to(dtype)
    found = [gradients(call, inputs, upstream) for call in (torch_form.deformable_attention, plain, exact)]
    for ours, base, oracle in zip(*found):
        assert_accurate(ours, base, oracle, rows=20)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_is_not_finite_is_seen_where_it_belongs(backend):
    what_is_not_finite_is_seen_where_it_belongs(backend)


def what_is_not_finite_is_seen_where_it_belongs(backend):
    """NaN of a pixel in the samples that read it, NaN of a weight in its query and head, outside of the map too."""
    levels = [(3, 4), (2, 2)]
    value, _, locations, weights = make(6, 2, 8, 2, levels, batch=1)
    locations[0, 0] = 5.0
    clean = ops.deformable_attention(value, levels, locations, weights, backend=backend)
    assert not clean[0, 0].any()
    value, weights = value.clone(), weights.clone()
    # The first and the last pixel of the first level, one channel of the second head.
    value[0, [0, 11], 1, 3] = math.nan
    weights[0, [0, 4], 0, 1, 1] = math.nan
    x, y = locations[0, :, 1, 0, :, 0] * 4 - 0.5, locations[0, :, 1, 0, :, 1] * 3 - 0.5
    reads = ((x.abs() < 1) & (y.abs() < 1)) | (((x - 3).abs() < 1) & ((y - 2).abs() < 1))
    seen = torch.zeros(6, 2, 8, dtype=torch.bool)
    seen[:, 1, 3] = reads.any(-1)
    seen[[0, 4], 0] = True
    assert 0 < reads.any(-1).sum() < 6
    ours = ops.deformable_attention(value, levels, locations, weights, backend=backend)
    assert torch.equal(ours.isnan()[0], seen.flatten(1))
    torch.testing.assert_close(ours[0][~seen.flatten(1)], clean[0][~seen.flatten(1)])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_location_that_is_not_finite_has_no_gradient(backend):
    a_location_that_is_not_finite_has_no_gradient(backend)


def a_location_that_is_not_finite_has_no_gradient(backend):
    value, levels, locations, weights = make(2, 1, 8, 2, [(3, 4)], batch=1)
    locations[0, 0, 0, 0, :, 0] = torch.tensor([math.nan, math.inf])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    out = ops.deformable_attention(leaves[0], levels, leaves[1], leaves[2], backend=backend)
    assert not out[0, 0].any() and out[0, 1].any()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in leaves)
    assert not leaves[1].grad[0, 0].any() and leaves[1].grad[0, 1].any() and not leaves[2].grad[0, 0].any()


REFUSED = {
    "three dimensions": (0, lambda v: v[0], r"value must be \[B, S, H, D\], got \[30, 2, 8\]"),
    "integers": (0, lambda v: v.int(), "value must be floating point, got torch.int32"),
    "integer weights": (3, lambda w: w.int(), "attention_weights must be floating point, got torch.int32"),
    "other device": (2, lambda x: x.to("meta"), "sampling_locations must be on cpu as value is, got meta"),
    "sizes on the device": (1, torch.tensor, r"must be a list of \(h, w\) on the host, got a tensor on cpu"),
    "too few pixels": (1, lambda s: s[:1], "have 24 pixels, but value has 30"),
    "no level": (1, lambda s: [], "have 0 pixels, but value has 30"),
    "a side of zero": (1, lambda s: [(5, 6), (0, 3)], r"must be pairs \(h, w\) of positive numbers, got \(0, 3\)"),
    "a triple": (1, lambda s: [(5, 6, 1)], r"must be pairs \(h, w\) of positive numbers"),
    "one coordinate": (
        2,
        lambda x: x[..., :1],
        r"sampling_locations must be \[B, Q, H, L, P, 2\] = \[2, 5, 2, 2, 4, 2\]",
    ),
    "another batch": (
        2,
        lambda x: x[:1],
        r"= \[2, 5, 2, 2, 4, 2\] for value \[2, 30, 2, 8\] and 2 levels, got \[1, 5,",
    ),
    "fewer points": (
        3,
        lambda w: w[..., :3],
        r"attention_weights must be .* = \[2, 5, 2, 2, 4\] .*, got \[2, 5, 2, 2, 3\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_came(case):
    at, change, message = REFUSED[case]
    inputs = list(make())
    inputs[at] = change(inputs[at])
    with pytest.raises(ValueError, match=f"deformable_attention: .*{message}"):
        ops.deformable_attention(*inputs)


def test_the_kernel_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run deformable_attention: triton "):
        ops.deformable_attention(*make(), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_of_the_dtype(dtype, backend):
    """grid_sample and all other steps run in float32 under autocast; the result has the dtype of values."""
    inputs = make(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.deformable_attention(*inputs, backend=backend)
    assert ours.dtype == dtype
    if backend == "torch":
        assert_accurate(ours, plain(*inputs), exact(*inputs))
