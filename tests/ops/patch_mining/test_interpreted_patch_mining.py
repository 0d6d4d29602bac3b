"""Patch mining by the interpreted kernel agrees with the float64 oracle, and keeps what else a caller may rely on."""

import contextlib
import functools
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from mg_fast import BackendError, MiniGeminiForConditionalGeneration, MiniGeminiProcessor, ops, use_backend
from mg_fast.ops import pooled_windows, reference
from mg_fast.ops.reference import Projection
from mg_fast.testing.tolerances import IMAGE_TOKENS, assert_accurate, relative_error
from tests.draws import normal
from tests.interpreting import INTERPRETED
from tests.ops.patch_mining.test_torch_patch_mining import CASES, make, oracle, upcast
from tests.paths import OWN_GOLDEN, original_golden

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A window takes a tenth of a second, so these are the cases of the other tests with fewer windows.
SMALLER = {
    "two pictures": dict(side=2, batch=2),
    "windows of 9, maps that do not halve": dict(side=3, window=9),
    "HD, maps that do not halve": dict(side=1, window=5, grid=2),
}
OWN = {
    "levels of one channel": dict(side=2, dims=(1, 1, 1, 1), dim=12),
    "wider than a block of channels": dict(side=1, dims=(70, 130)),
    "five levels": dict(side=1, window=16, dims=(3, 4, 5, 6, 7)),
    "four cells a side": dict(side=1, window=4, grid=4, dims=(6, 10)),
}
SHAPES = CASES | SMALLER | OWN


def kernel(queries, pyramid, projections, grid):
    return ops.patch_mining(queries, pyramid, *projections, grid=grid, backend="triton")


def plain_form(queries, pyramid, projections, grid):
    return reference.patch_mining(queries, pyramid, *projections, grid=grid)


def assert_accurate_without_gradients(inputs):
    with torch.no_grad():
        ours = kernel(*inputs)
        assert ours.dtype == inputs[0].dtype and ours.shape == inputs[0].shape
        assert_accurate(ours, plain_form(*inputs), oracle(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_accuracy(case, dtype):
    assert_accurate_without_gradients(make(**SHAPES[case], dtype=dtype))


def test_queries_without_views():
    queries, *rest = make(2, dims=(8, 24))
    assert torch.equal(kernel(queries[:, 0], *rest), kernel(queries, *rest)[:, 0])


@pytest.mark.parametrize("grid", [1, 2])
def test_no_picture(grid):
    queries, pyramid, projections, grid = make(2, batch=0, grid=grid)
    queries.requires_grad_()
    out = kernel(queries, pyramid, projections, grid)
    assert out.shape == queries.shape
    out.sum().backward()
    assert queries.grad.shape == queries.shape
    assert all(t.grad is None or t.grad.isfinite().all() for projection in projections for t in projection)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [1, 2])
def test_large_common_offset(grid, dtype):
    """The variance does not drown where the mean of the features is fifty times their spread."""
    assert_accurate_without_gradients(make(1, grid=grid, window=4, dims=(6, 10, 14), offset=50.0, dtype=dtype))


def test_larger_common_offset():
    assert_accurate_without_gradients(make(2, window=4, dims=(6, 10, 14), offset=1000.0))


def test_features_near_the_largest_of_float16():
    queries, pyramid, projections, grid = make(2, window=4, dims=(6, 10, 14), dtype=torch.float16)
    inputs = queries, [level * (6e4 / level.abs().max()) for level in pyramid], projections, grid
    assert all(level.isfinite().all() for level in inputs[1])
    assert_accurate_without_gradients(inputs)


def test_float16_does_not_overflow_where_the_scores_do():
    queries, pyramid, projections, grid = make(2, window=4, dims=(6, 10, 14), dtype=torch.float16)
    large = [Projection(*(t.detach() * 40 for t in p)) for p in projections[:2]] + projections[2:]
    inputs = queries * 100, pyramid, large, grid
    with torch.no_grad():
        q, k = (p(torch.ones_like(p.norm_weight)[None]) for p in large[:2])
        # The scores would overflow, which is what this case is about.
        assert (q.float() @ k.float().mT).abs().max() > torch.finfo(torch.float16).max
        ours, exact = kernel(*inputs), oracle(*inputs)
    assert ours.isfinite().all()
    # The weights are nearly one-hot. An error in the last place of a float16 score may choose another pixel, so only
    # the size of the result is compared.
    assert ours.abs().max() <= 4 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_windows_larger_than_the_kernel_holds(dtype):
    queries, pyramid, projections, grid = make(1, window=17, dims=(4, 4), dtype=dtype)
    with pytest.raises(
        BackendError, match="cannot run patch_mining: the kernel holds windows of up to 16x16 pixels, these have 17x17"
    ):
        kernel(queries, pyramid, projections, grid)


@pytest.mark.parametrize("which", ["queries", "a level"])
def test_dtypes_that_the_kernel_does_not_take(which):
    queries, pyramid, projections, grid = make(1, dims=(4, 4))
    if which == "queries":
        queries = queries.double()
    else:
        pyramid[1] = pyramid[1].double()
    with pytest.raises(BackendError, match="the kernel takes float16, bfloat16 and float32, got torch.float64"):
        kernel(queries, pyramid, projections, grid)


def strided(queries, pyramid):
    """The same values in other layouts."""

    def within(tensor, dim):
        """A slice of a wider tensor, whose other elements would be noticed if they were read."""
        noise = torch.full_like(tensor, float("nan"))
        return torch.cat([noise, tensor, noise], dim=dim).narrow(dim, tensor.shape[dim], tensor.shape[dim])

    return {
        "stored as NCHW": (queries, [level.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for level in pyramid]),
        "rows and columns swapped": (
            queries,
            [level.transpose(1, 2).contiguous().transpose(1, 2) for level in pyramid],
        ),
        "channels of a wider tensor": (queries, [within(level, 3) for level in pyramid]),
        "rows of a taller tensor": (queries, [within(level, 1) for level in pyramid]),
        "every other column": (queries, [level.repeat_interleave(2, dim=2)[:, :, ::2] for level in pyramid]),
        "levels of different layouts": (queries, [within(pyramid[0], 2), *pyramid[1:-1], within(pyramid[-1], 0)]),
        "queries of a wider tensor": (within(queries, 3), pyramid),
        "queries stored picture by picture last": (queries.transpose(0, 2).contiguous().transpose(0, 2), pyramid),
    }


STRIDED = dict(side=2, window=2, batch=2, dims=(6, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(dtype):
    """The bits are the same for every layout, forward and backward."""
    queries, pyramid, projections, grid = make(**STRIDED, dtype=dtype)

    def run(queries, pyramid):
        queries = queries.detach().requires_grad_()
        out = kernel(queries, pyramid, projections, grid)
        return out.detach(), torch.autograd.grad(out.square().sum(), queries)[0]

    expected = run(queries, pyramid)
    for name, layout in strided(queries, pyramid).items():
        assert any(not t.is_contiguous() for t in (layout[0], *layout[1])), name
        for ours, wanted in zip(run(*layout), expected):
            assert torch.equal(ours, wanted), name


def test_one_picture_for_all():
    queries, pyramid, projections, grid = make(2, window=4, batch=2, dims=(6, 10))
    once = [level[:1].expand(2, -1, -1, -1) for level in pyramid]
    assert once[0].stride(0) == 0
    with torch.no_grad():
        assert torch.equal(
            kernel(queries, once, projections, grid), kernel(queries, [t.contiguous() for t in once], projections, grid)
        )


def test_operators_take_strided_queries_and_gradients():
    queries, pyramid, _, grid = make(1, window=4, batch=2, dims=(6, 10), dim=16)
    pooled, statistics = ops.pool_windows(queries, pyramid, grid)
    assert torch.equal(ops.pool_windows(queries.transpose(0, 3).contiguous().transpose(0, 3), pyramid, grid)[0], pooled)
    grad = normal(1, *queries.shape)
    expected = ops.pool_windows_backward(grad, queries, pyramid, statistics, grid)
    swapped = grad.transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.equal(ops.pool_windows_backward(swapped, queries, pyramid, statistics, grid), expected)
    one = torch.ones(()).expand_as(grad)
    assert torch.equal(
        ops.pool_windows_backward(one, queries, pyramid, statistics, grid),
        ops.pool_windows_backward(one.contiguous(), queries, pyramid, statistics, grid),
    )


def depend_on(pyramid, s, y, x, grid, views, side):
    """The windows [V, N] in which a pixel of a level has a weight, found by resizing a map that is zero elsewhere."""
    maps = [torch.zeros(1, 1, *level.shape[1:3], dtype=torch.float64) for level in pyramid]
    maps[s][..., y, x] = 1.0
    fine = torch.nn.functional.interpolate(maps[s], size=maps[0].shape[-2:], mode="bilinear", align_corners=False)
    n = fine.shape[-1]
    cells = fine.reshape(grid, side, n // (grid * side), grid, side, -1).ne(0).any(5).any(2)
    cells = cells.permute(0, 2, 1, 3).reshape(grid * grid, side * side)
    if views == grid * grid:
        return cells
    whole = torch.nn.functional.interpolate(fine, scale_factor=1 / grid, mode="bilinear", align_corners=False)
    whole = whole.reshape(side, n // (grid * side), side, -1).ne(0).any(3).any(1)
    return torch.cat([cells, whole.reshape(1, side * side)])


NOT_FINITE = {
    "standard": dict(side=3, window=4, dims=(5, 6, 7)),
    "HD": dict(side=1, grid=2, window=5, dims=(5, 6)),
    "three cells a side": dict(side=1, grid=3, window=4, dims=(5, 6, 7)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_where_it_belongs(case, dtype, bad):
    queries, pyramid, projections, grid = make(**NOT_FINITE[case], dtype=dtype)
    _, views, n, _ = queries.shape
    with torch.no_grad():
        clean = kernel(queries, pyramid, projections, grid)[0]
        for s, (y, x) in zip(range(len(pyramid)), [(3, 4), (0, 1), (0, 1)]):
            spoilt = [level.clone() for level in pyramid]
            spoilt[s][0, y, x, -1] = bad
            seen = depend_on(pyramid, s, y, x, grid, views, math.isqrt(n))
            assert seen.any() and not seen.all()
            out = kernel(queries, spoilt, projections, grid)[0]
            assert not out[seen].isfinite().any(), (s, y, x)
            assert torch.equal(out[~seen], clean[~seen]), (s, y, x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_query_that_is_not_finite_is_seen_in_its_window_only():
    queries, pyramid, projections, grid = make(2, window=4, batch=2, dims=(6, 10))
    with torch.no_grad():
        clean = kernel(queries, pyramid, projections, grid)
        queries[1, 0, 2, 3] = math.nan
        out = kernel(queries, pyramid, projections, grid)
    spoilt = torch.zeros(queries.shape[:3], dtype=torch.bool)
    spoilt[1, 0, 2] = True
    assert not out[spoilt].isfinite().any() and torch.equal(out[~spoilt], clean[~spoilt])


def gradients(function, inputs, upstream):
    queries, pyramid, projections, grid = inputs
    queries, *pyramid = (t.detach().clone().requires_grad_() for t in (queries, *pyramid))
    projections = [Projection(*(t.detach().clone().requires_grad_() for t in p)) for p in projections]
    out = function(queries, pyramid, projections, grid)
    leaves = {"queries": queries} | {f"level {s}": level for s, level in enumerate(pyramid)}
    for name, projection in zip(("query", "key", "value"), projections):
        leaves |= {f"{name} {field}": t for field, t in projection._asdict().items()}
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))))


@contextlib.contextmanager
def double_throughout():
    """Lets the reference's merge, which rounds to float32 as the original's does, compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


GRADIENTS = {
    "standard": dict(side=2, batch=2, window=4, dims=(6, 10, 14)),
    "HD": dict(side=1, grid=2, window=4, dims=(6, 10, 14)),
    "HD without the global view": dict(side=1, grid=2, views=4, window=8, dims=(5, 7, 9, 11), dim=13),
    "three cells a side, maps that do not halve": dict(side=1, grid=3, window=3, dims=(5, 7), dim=8),
    "wider than a block of channels": dict(side=1, window=4, dims=(70, 130)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case, dtype):
    inputs = make(**GRADIENTS[case], dtype=dtype)
    upstream = normal(1, *inputs[0].shape).to(dtype)
    ours, plain = gradients(kernel, inputs, upstream), gradients(plain_form, inputs, upstream)
    with double_throughout():
        exact = gradients(plain_form, upcast(*inputs), upstream)
    for name, gradient in ours.items():
        assert gradient.dtype == dtype, name
        if name in ("key norm_bias", "key bias"):
            # This parameter adds a constant to the scores, which cancels in the softmax.
            assert not gradient.any(), name
            continue
        # The gradient of a parameter is summed over all queries, and rounded as often.
        rows = inputs[0][..., 0].numel() if name.startswith(("query ", "key ", "value ")) else 1
        try:
            assert_accurate(gradient, plain[name], exact[name], rows=rows)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_gradient_of_a_sum():
    """The gradient of a sum, which is one expanded number, gives the same result as a full tensor."""
    inputs = make(2, window=4, dims=(6, 10))
    whole = gradients(kernel, inputs, torch.ones(inputs[0].shape))
    expanded = gradients(kernel, inputs, torch.ones(()).expand(inputs[0].shape))
    for name in whole:
        assert torch.equal(whole[name], expanded[name]), name


def counting(monkeypatch, name):
    calls, operator = [], getattr(ops, name)

    def counted(*args):
        calls.append(args)
        return operator(*args)

    # `mg_fast.ops.patch_mining` as an attribute is the function of that name.
    for module in (pooled_windows, sys.modules["mg_fast.ops.patch_mining"]):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted)
    return calls


def test_only_what_is_wanted_is_computed(monkeypatch):
    queries, pyramid, _, grid = make(1, window=4, dims=(6, 10), dim=16)
    to_queries, to_pyramid = (
        counting(monkeypatch, "pool_windows_backward"),
        counting(monkeypatch, "pool_windows_backward_pyramid"),
    )
    everything = [t.clone().requires_grad_() for t in (queries, *pyramid)]
    ops.pool_windows(everything[0], everything[1:], grid)[0].square().sum().backward()
    assert (len(to_queries), len(to_pyramid)) == (1, 1)

    alone = queries.clone().requires_grad_()
    ops.pool_windows(alone, pyramid, grid)[0].square().sum().backward()
    assert (len(to_queries), len(to_pyramid)) == (2, 1)
    assert torch.equal(alone.grad, everything[0].grad)

    coarse = pyramid[1].clone().requires_grad_()
    ops.pool_windows(queries, [pyramid[0], coarse], grid)[0].square().sum().backward()
    assert (len(to_queries), len(to_pyramid)) == (2, 2)
    assert torch.allclose(coarse.grad, everything[2].grad, rtol=1e-6, atol=0)


def test_no_grad():
    queries, pyramid, projections, grid = make(1, window=4, dims=(6, 10))
    with torch.no_grad():
        assert not kernel(queries.requires_grad_(), pyramid, projections, grid).requires_grad


@pytest.mark.parametrize("grid", [1, 2])
def test_operators_keep_torchs_rules(grid):
    queries, pyramid, _, grid = make(1, grid=grid, window=2, dims=(3, 4), dim=7)
    pooled, statistics = ops.pool_windows(queries, pyramid, grid)
    grad, operators = torch.randn_like(pooled), torch.ops.mg_fast
    leaves = [t.clone().requires_grad_() for t in (queries, *pyramid)]
    torch.library.opcheck(operators.patch_mining.default, (leaves[0], leaves[1:], grid))
    torch.library.opcheck(operators.patch_mining_backward.default, (grad, queries, pyramid, statistics, grid))
    torch.library.opcheck(
        operators.patch_mining_backward_pyramid.default, (grad, queries, pyramid, [True, False], grid)
    )


@pytest.mark.parametrize("grid", [1, 2])
def test_one_graph_under_compile(grid):
    torch._dynamo.reset()
    inputs = make(1, grid=grid, window=4, dims=(6, 10))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernel, backend=counter, fullgraph=True, dynamic=False)
    upstream = normal(1, *inputs[0].shape)
    expected, ours = gradients(kernel, inputs, upstream), gradients(compiled, inputs, upstream)
    for name in expected:
        assert torch.allclose(ours[name], expected[name], rtol=1e-5, atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(compiled(*inputs), kernel(*inputs), rtol=1e-5, atol=1e-6)
    # There is one graph with gradients, and one without.
    assert counter.frame_count == 2


@pytest.mark.parametrize("grid", [1, 2])
def test_autocast(grid):
    inputs = make(1, grid=grid, window=4, dims=(6, 10, 14))
    with torch.no_grad():
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
            ours, plain = kernel(*inputs), plain_form(*inputs)
        assert ours.dtype == plain.dtype == torch.bfloat16
        assert_accurate(ours, plain, oracle(*inputs))


def test_choosing_the_backend(monkeypatch):
    queries, pyramid, projections, grid = make(1, window=4, dims=(6, 10))
    calls = counting(monkeypatch, "pool_windows")
    with torch.no_grad():
        expected = kernel(queries, pyramid, projections, grid)

        def runs(**arguments):
            before = len(calls)
            out = ops.patch_mining(queries, pyramid, *projections, grid=grid, **arguments)
            return len(calls) > before and torch.equal(out, expected)

        monkeypatch.delenv("MG_FAST_BACKEND", raising=False)
        assert not runs()
        with use_backend("triton"):
            assert runs() and not runs(backend="torch")
        monkeypatch.setenv("MG_FAST_BACKEND", "triton")
        assert runs() and not runs(backend="reference")
        with use_backend("torch"):
            assert not runs()


def test_backward_remembers_the_backend(monkeypatch):
    queries, pyramid, projections, grid = make(1, window=4, dims=(6, 10))
    calls = counting(monkeypatch, "pool_windows_backward")
    queries.requires_grad_()
    with use_backend("triton"):
        out = ops.patch_mining(queries, pyramid, *projections, grid=grid)
    with use_backend("reference"):
        out.square().sum().backward()
    assert len(calls) == 1 and queries.grad.isfinite().all()


def image_tokens(folder, picture, *, tower):
    """The image tokens of a checkpoint by the kernels, with the high-resolution tower by the backend `tower`."""
    processor = MiniGeminiProcessor.from_pretrained(folder)
    device = torch.get_default_device()
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder).to(device).model
    inputs = processor.image_processor(picture).to(device)
    see_high = functools.partial(model.vision_tower_aux, backend=tower)
    with torch.inference_mode():
        return model.picture_features(**inputs, see_high=see_high, backend="triton").image_tokens.cpu()


@pytest.mark.parametrize("name, tower", [("mgm-gemma", "triton"), ("mgm-llama-hd", "torch")])
def test_original(golden, name, tower):
    """The original's image tokens, for a standard checkpoint and one in HD.

    The tower of HD is that of the standard checkpoint on a larger picture, which would take a minute.
    """
    expected = load_file(golden / name / "expected.safetensors")["image0.image_tokens"]
    ours = image_tokens(golden / name, golden / name / "image0.png", tower=tower)
    assert relative_error(ours, expected) <= IMAGE_TOKENS


@pytest.mark.parametrize("kind, tower", [("standard", "triton"), ("hd", "torch")])
def test_recorded_outputs(kind, tower, photo):
    """The same for the project's own records, which every machine has."""
    if original_golden():
        pytest.skip("the original's own outputs are here")
    expected = load_file(OWN_GOLDEN / kind / "expected.safetensors")["case0.image_tokens"]
    assert relative_error(image_tokens(OWN_GOLDEN / kind, photo, tower=tower), expected) <= IMAGE_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_one_pixel_far_from_the_others(dtype, offset):
    """The number that is subtracted from a pixel is not the mean of another one."""
    queries, pyramid, projections, grid = make(1, dims=(40, 40), dim=16)
    for level in pyramid:
        level[:, 0, 0] += offset
    queries, pyramid = queries.to(dtype), [level.to(dtype) for level in pyramid]
    projections = [reference.Projection(*(t.to(dtype) for t in p)) for p in projections]
    with torch.no_grad():
        ours = ops.patch_mining(queries, pyramid, *projections, grid=grid, backend="triton")
        plain = reference.patch_mining(queries, pyramid, *projections, grid=grid)
        assert_accurate(ours, plain, oracle(queries, pyramid, projections, grid))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_levels_of_other_dtypes_than_the_queries(dtypes):
    queries, pyramid, projections, grid = make(2, dims=(8, 16))
    pyramid = [level.to(dtype) for level, dtype in zip(pyramid, dtypes)]
    with torch.no_grad():
        ours = ops.patch_mining(queries, pyramid, *projections, grid=grid, backend="triton")
        plain = reference.patch_mining(queries, [level.float() for level in pyramid], *projections, grid=grid)
        assert ours.dtype == torch.float32
        assert_accurate(ours, plain, oracle(queries, pyramid, projections, grid))


def test_statistics_are_not_differentiable():
    queries, pyramid, _, grid = make(1, dims=(8,))
    pooled, statistics = ops.pool_windows(torch.randn(*queries.shape[:3], 8, requires_grad=True), pyramid, grid)
    assert pooled.requires_grad and not statistics.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", [dict(side=3, batch=2), dict(side=2, grid=2)], ids=["standard", "HD"])
def test_captured_in_a_cuda_graph(case, backend):
    """A replay is right on other numbers than the graph was captured with."""
    queries, pyramid, projections, grid = make(**case)

    def run():
        return ops.patch_mining(queries, pyramid, *projections, grid=grid, backend=backend)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for tensor in (queries, *pyramid):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert torch.equal(captured, run())
