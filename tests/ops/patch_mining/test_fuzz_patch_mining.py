"""Random shapes, layouts and values through both interpreted kernels keep the accuracy rule.

`make fuzz` tries twenty times as many.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mg_fast import ops
from mg_fast.modules import PatchInfoMining
from mg_fast.ops import reference
from mg_fast.ops.torch import patch_mining as torch_form
from mg_fast.testing.tolerances import errors
from tests import draws
from tests.fuzzing import assert_accurate_by_draws, fuzz
from tests.ops.patch_mining.test_torch_patch_mining import oracle, projections_of


class Case(NamedTuple):
    """One draw, in which the seed decides everything that is not named here."""

    dtype: str
    grid: int
    global_view: bool
    side: int
    batch: int
    window: int
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    layouts: tuple[str, ...]
    dim: int
    scale: float
    offset: float
    seed: int


def within(tensor, dim):
    """The same values inside a wider tensor of NaN."""
    around = torch.full_like(tensor, float("nan"))
    return torch.cat([around, tensor, around], dim=dim).narrow(dim, tensor.shape[dim], tensor.shape[dim])


LAYOUTS = {
    "contiguous": lambda level: level,
    "NCHW": lambda level: level.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns first": lambda level: level.transpose(1, 2).contiguous().transpose(1, 2),
    "rows within": lambda level: within(level, 1),
    "columns within": lambda level: within(level, 2),
    "channels within": lambda level: within(level, 3),
}
# Grid, global view, side, batch. Cases of many windows take long, so they are rare.
VIEWS = (
    [(1, False, 1, 1)] * 24
    + [(1, False, 1, 2)] * 3
    + [(1, False, 2, 1), (2, False, 1, 1), (2, True, 1, 1), (3, False, 1, 1), (3, True, 1, 1)]
)
VIEWS += [(1, False, 1, 0), (2, True, 2, 0)]


@st.composite
def cases(draw, dtypes=("float32", "float16", "bfloat16")):
    grid, global_view, side, batch = draw(st.sampled_from(VIEWS))
    window = draw(st.integers(1, 10 if grid * side == 1 else 4))
    fine = grid * side * window
    halved = st.just([max(fine >> s, 1) for s in range(5)])
    levels = draw(st.integers(1, 5))
    # "Finest first" means that no level is larger than the first one.
    sizes = draw(halved | st.lists(st.integers(1, fine), min_size=4, max_size=4).map(lambda rest: [fine, *rest]))[
        :levels
    ]
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        grid=grid,
        global_view=global_view,
        side=side,
        batch=batch,
        window=window,
        sizes=tuple(sizes),
        # Up to two blocks of channels. Of one or two channels LayerNorm leaves a sign or nothing, which would raise
        # rounding errors to the size of a feature.
        widths=tuple(
            draw(st.lists(st.integers(1, 24), min_size=levels, max_size=levels).filter(lambda widths: sum(widths) > 3))
        ),
        layouts=tuple(draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=levels, max_size=levels))),
        # Over a handful of numbers the largest error says little.
        dim=draw(st.integers(16, 40)),
        scale=draw(st.sampled_from([1.0, 0.05, 20.0])),
        offset=draw(st.sampled_from([0.0, 1.0, -50.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case):
    dtype, normal = (
        getattr(torch, case.dtype),
        functools.partial(draws.normal, torch.Generator().manual_seed(case.seed)),
    )

    views = case.grid**2 + case.global_view
    queries = normal(case.batch, views, case.side**2, case.dim).to(dtype)
    pyramid = [
        LAYOUTS[layout](((normal(case.batch, n, n, c) + case.offset) * case.scale).to(dtype))
        for n, c, layout in zip(case.sizes, case.widths, case.layouts)
    ]
    mining = PatchInfoMining(case.dim, case.widths)
    for name, p in mining.named_parameters():
        p.data = normal(*p.shape) * 0.3 + (1.0 if name.endswith("0.weight") else 0.0)
    return queries, pyramid, projections_of(mining.to(dtype)), case.grid


def plain_pool(queries, pyramid, grid):
    """The definition of pooling: the reference without projections and without its scaling of the scores."""
    channels = queries.shape[-1]

    def normalised(x):
        return F.layer_norm(x, (channels,), eps=reference.LAYER_NORM_EPS)

    return reference.patch_mining(
        queries, pyramid, lambda q: q, lambda x: normalised(x) * channels**0.5, normalised, grid=grid
    )


def gradient(pool, queries, pyramid, grid, upstream):
    """The gradient from the pooled windows to the queries."""
    queries = queries.detach().requires_grad_()
    pooled = pool(queries, pyramid, grid)
    return torch.autograd.grad(pooled, queries, upstream.to(pooled.dtype))[0]


def pooling(case):
    """The arguments of `gradient` that follow from a case."""
    queries, pyramid, _, grid = build(case)
    normal = functools.partial(draws.normal, torch.Generator().manual_seed(case.seed + 1))
    shape = (*queries.shape[:3], sum(case.widths))
    # The scores are of order one, so that neither one pixel takes all of the weight nor all pixels take the same.
    absorbed_queries = (normal(*shape) * shape[-1] ** -0.5).to(queries.dtype)
    return absorbed_queries, pyramid, grid, normal(*shape).to(queries.dtype)


def exact_gradient(queries, pyramid, grid, upstream):
    return gradient(
        torch_form.pool_windows, queries.double(), [level.double() for level in pyramid], grid, upstream.double()
    )


def compare(case, inputs, ours, plain, exact):
    """Applies the accuracy rule, with the plain form at its worst of eight draws."""
    arguments = inputs(case)
    result, expected = ours(*arguments), exact(*arguments)
    assert result.dtype == arguments[0].dtype and result.shape == arguments[0].shape
    if expected.numel() == 0:
        return

    def plain_errors(draw):
        arguments = inputs(case._replace(seed=case.seed + 10**5 * draw))
        return errors(plain(*arguments), exact(*arguments))

    assert_accurate_by_draws(result, expected, plain_errors)


def compare_forward(case, kernel):
    with torch.no_grad():
        compare(
            case,
            build,
            lambda queries, pyramid, projections, grid: ops.patch_mining(
                queries, pyramid, *projections, grid=grid, backend="triton", kernel=kernel
            ),
            lambda queries, pyramid, projections, grid: reference.patch_mining(
                queries, pyramid, *projections, grid=grid
            ),
            oracle,
        )


def compare_backward(case, kernel):
    compare(
        case,
        pooling,
        lambda *arguments: gradient(lambda *inputs: ops.pool_windows(*inputs, kernel)[0], *arguments),
        lambda *arguments: gradient(plain_pool, *arguments),
        exact_gradient,
    )


@fuzz(250)
@given(cases())
def test_forward(case):
    compare_forward(case, "fine")


@fuzz(125)
@given(cases())
def test_backward(case):
    compare_backward(case, "fine")


@fuzz(40)
@given(cases(["float16", "bfloat16"]))
def test_forward_on_coarse_pixels(case):
    compare_forward(case, "coarse")


@fuzz(20)
@given(cases(["float16", "bfloat16"]))
def test_backward_on_coarse_pixels(case):
    compare_backward(case, "coarse")
