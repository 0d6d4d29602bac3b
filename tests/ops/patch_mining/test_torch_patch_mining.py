"""The absorbed form of patch info mining agrees with the float64 oracle, by the project's accuracy rule."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mg_fast.modules import PatchInfoMining
from mg_fast.ops import reference
from mg_fast.ops.torch import patch_mining as torch_form
from mg_fast.testing.tolerances import assert_accurate
from tests.draws import normal

CASES = {
    "one window": dict(side=1),
    "two pictures": dict(side=3, batch=2),
    "prime widths": dict(side=3, dims=(7, 11, 13, 17), dim=19),
    "two levels": dict(side=2, dims=(8, 24)),
    "one level": dict(side=2, dims=(8,)),
    "windows of 4": dict(side=3, window=4, dims=(6, 10, 14)),
    "windows of 16": dict(side=2, window=16),
    "windows of 9, maps that do not halve": dict(side=5, window=9),
    "HD": dict(side=2, grid=2),
    "HD without the global view": dict(side=2, grid=2, views=4),
    "three cells a side": dict(side=1, grid=3),
    "HD, maps that do not halve": dict(side=3, window=5, grid=2),
}


@pytest.fixture(autouse=True, params=["together", "row by row"])
def taken(request, monkeypatch):
    """Both ways on a CPU: small pictures are processed together; large ones row by row, with the same results."""
    if request.param == "row by row":
        monkeypatch.setattr(torch_form, "TOGETHER", 0)


def make(
    side,
    *,
    window=8,
    grid=1,
    batch=1,
    dims=(6, 10, 14, 18),
    dim=12,
    views=None,
    offset=0.0,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    fine = grid * side * window
    views = views or grid * grid + (grid > 1)
    queries = normal(generator, batch, views, side * side, dim).to(dtype)
    pyramid = [(normal(generator, batch, fine >> s, fine >> s, c) + offset).to(dtype) for s, c in enumerate(dims)]
    mining = PatchInfoMining(dim, dims)
    for name, p in mining.named_parameters():
        p.data = normal(generator, *p.shape) * 0.3 + (1.0 if name.endswith("0.weight") else 0.0)
    projections = projections_of(mining.to(dtype))
    return queries, pyramid, projections, grid


def projections_of(mining):
    parts = (mining.vlm_uni_query_projector, mining.vlm_uni_aux_projector, mining.vlm_uni_val_projector)
    return [reference.Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias) for p in parts]


def upcast(queries, pyramid, projections, grid):
    double = [reference.Projection(*(t.detach().double() for t in p)) for p in projections]
    return queries.double(), [level.double() for level in pyramid], double, grid


def oracle(queries, pyramid, projections, grid):
    """The definition in float64 throughout, without the rounding to float32 in the reference's merge."""
    queries, pyramid, projections, grid = upcast(queries, pyramid, projections, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return reference.patch_mining(queries, pyramid, *projections, grid=grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype):
    queries, pyramid, projections, grid = inputs = make(**CASES[case], dtype=dtype)
    with torch.no_grad():
        ours = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
        plain = reference.patch_mining(queries, pyramid, *projections, grid=grid)
        assert ours.dtype == dtype and ours.shape == queries.shape
        assert_accurate(ours, plain, oracle(*inputs))


@pytest.mark.parametrize("grid", [1, 2])
def test_pictures_of_a_batch_do_not_know_each_other(grid, monkeypatch):
    """Five pictures, of which two are processed at a time, give the results of each alone, forward and backward."""
    queries, pyramid, _, grid = make(2, batch=5, grid=grid, dim=48)
    monkeypatch.setattr(torch_form, "TOGETHER", sum(10 * level[0].numel() for level in pyramid))
    parts = []
    pool = torch_form._pool_raster
    monkeypatch.setattr(
        torch_form, "_pool_raster", lambda *args, **options: parts.append(len(args[0])) or pool(*args, **options)
    )

    def run(*inputs):
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = torch_form.pool_windows(inputs[0], inputs[1:], grid)
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in inputs)]

    whole = run(queries, *pyramid)
    assert set(parts) == {2, 1} and parts.count(1) < parts.count(2)
    alone = [run(*(t[i : i + 1] for t in (queries, *pyramid))) for i in range(5)]
    for got, rows in zip(whole, zip(*alone)):
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2])
def test_no_picture(grid):
    queries, pyramid, projections, grid = make(2, batch=0, grid=grid)
    assert torch_form.patch_mining(queries, pyramid, *projections, grid=grid).shape == queries.shape


@pytest.mark.parametrize("grid", [1, 2])
def test_large_common_offset(grid):
    """The variance does not drown where the mean of the features is fifty times their spread."""
    queries, pyramid, projections, grid = inputs = make(2, grid=grid, offset=50.0)
    with torch.no_grad():
        ours = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
        assert_accurate(ours, reference.patch_mining(queries, pyramid, *projections, grid=grid), oracle(*inputs))


@pytest.mark.parametrize("grid", [1, 2])
def test_gradients_reach_everything(grid):
    queries, pyramid, projections, grid = make(2, grid=grid)
    upstream = normal(1, *queries.shape)

    def gradients(function):
        leaves = [queries.clone().requires_grad_(), *(level.clone().requires_grad_() for level in pyramid)]
        parameters = [[t.detach().clone().requires_grad_() for t in p] for p in projections]
        out = function(leaves[0], leaves[1:], *(reference.Projection(*p) for p in parameters), grid=grid)
        return torch.autograd.grad((out * upstream).sum(), [*leaves, *(t for p in parameters for t in p)])

    for ours, plain in zip(gradients(torch_form.patch_mining), gradients(reference.patch_mining)):
        # The key's two biases cancel in the softmax, so their gradients are zero here and rounding errors there.
        assert (ours - plain).abs().max() <= 1e-4 * max(plain.abs().max().item(), 1.0)


def test_slices_and_transposes():
    queries, pyramid, projections, grid = make(2, batch=2)
    expected = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
    strided = [level.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for level in pyramid]
    wide = torch.cat([queries, queries], dim=-1)[..., : queries.shape[-1]]
    assert torch.allclose(torch_form.patch_mining(wide, strided, *projections, grid=grid), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_in_its_picture(bad):
    queries, pyramid, projections, grid = make(2, batch=2)
    pyramid[0][0, 1, 1, 0] = bad
    out = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
    assert not out[0, 0, 0].isfinite().any() and out[1].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("grid", [1, 2])
def test_one_graph_under_compile(grid):
    queries, pyramid, projections, grid = make(2, grid=grid)
    compiled = torch.compile(
        lambda q, *p: torch_form.patch_mining(q, p, *projections, grid=grid),
        backend="eager",
        fullgraph=True,
        dynamic=False,
    )
    with torch.no_grad():
        expected = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
        assert torch.allclose(compiled(queries, *pyramid), expected, atol=1e-6)


def test_a_trace_on_fake_tensors_leaves_nothing_behind():
    queries, pyramid, projections, grid = make(2, window=6, grid=2, dims=(3, 5))
    with FakeTensorMode() as mode, torch.no_grad():
        fake = [reference.Projection(*(mode.from_tensor(t) for t in p)) for p in projections]
        out = torch_form.patch_mining(
            mode.from_tensor(queries), [mode.from_tensor(level) for level in pyramid], *fake, grid=grid
        )
    assert out.shape == queries.shape
    assert type(torch_form.patch_mining(queries, pyramid, *projections, grid=grid)) is torch.Tensor


def test_tables_made_in_inference_mode_serve_training():
    queries, pyramid, projections, grid = make(2, window=10, grid=2, dims=(3, 5))
    with torch.inference_mode():
        torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
    queries.requires_grad_()
    torch_form.patch_mining(queries, pyramid, *projections, grid=grid).sum().backward()
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_projections_only(dtype):
    """It does so as the plain form does, although the sums of these features' squares are beyond float16."""
    queries, pyramid, projections, grid = make(2, grid=2)
    pyramid = [100 * level for level in pyramid]
    with torch.no_grad():
        exact = oracle(queries, pyramid, projections, grid)
        with torch.autocast("cpu", dtype=dtype):
            ours = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
            plain = reference.patch_mining(queries, pyramid, *projections, grid=grid)
        assert ours.dtype == plain.dtype == dtype
        assert_accurate(ours, plain, exact)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(1000 + seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    levels = pick(1, 4)
    case = dict(side=pick(1, 4), window=pick(2, 3) * 4, grid=pick(1, 2), batch=pick(1, 2), dim=pick(1, 20))
    inputs = make(**case, dims=tuple(pick(2, 24) for _ in range(levels)), offset=float(pick(0, 3)), seed=seed)
    queries, pyramid, projections, grid = inputs
    with torch.no_grad():
        ours = torch_form.patch_mining(queries, pyramid, *projections, grid=grid)
        assert_accurate(ours, reference.patch_mining(queries, pyramid, *projections, grid=grid), oracle(*inputs))


def test_float16_does_not_overflow_where_the_scores_do():
    queries, pyramid, projections, grid = make(2)
    large = [reference.Projection(*(t * 40 for t in p)) for p in projections[:2]] + projections[2:]
    half = [reference.Projection(*(t.half() for t in p)) for p in large]
    with torch.no_grad():
        out = torch_form.patch_mining(queries.half() * 100, [level.half() for level in pyramid], *half, grid=grid)
    assert out.isfinite().all()
