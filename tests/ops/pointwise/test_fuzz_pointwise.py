"""Random shapes, layouts, values and tiles through the interpreted pointwise kernels keep the accuracy rule."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mg_fast import ops
from mg_fast.kernels import pointwise
from mg_fast.kernels.configs import POINTWISE, ProductTile
from mg_fast.testing.tolerances import assert_accurate
from tests.fuzzing import fuzz
from tests.ops.pointwise.test_interpreted_pointwise import within
from tests.ops.pointwise.test_pointwise import OPERATIONS, make, oracle, plain

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "channels within": lambda t: within(t, 1),
    "rows within": lambda t: within(t, 0),
    "every other row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "one row for all": lambda t: t[:1].expand(len(t), -1),
}
# Tiles as launches take them, and smaller ones, so that a few rows need many programs.
TILES = [
    None,
    *POINTWISE[None].values(),
    *(ProductTile(16, 16, 16, group, 4, 2) for group in (1, 2, 5)),
    ProductTile(32, 16, 32, 8, 4, 2),
]


class Case(NamedTuple):
    """One draw, in which the seed decides everything that is not named here."""

    operation: str
    dtype: str
    residual_dtype: str
    rows: int
    outputs: int
    inputs: int
    layouts: tuple[str, str, str]
    tile: ProductTile | None
    scale: float
    offset: float
    bias: float
    seed: int


@st.composite
def cases(draw):
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    dtype = draw(dtypes)
    return Case(
        operation=draw(st.sampled_from(OPERATIONS)),
        dtype=dtype,
        residual_dtype=draw(st.just(dtype) | dtypes),
        rows=draw(st.integers(0, 80)),
        outputs=draw(st.integers(1, 80) | st.sampled_from([16, 32, 64])),
        inputs=draw(st.integers(1, 100) | st.sampled_from([16, 32, 64])),
        layouts=tuple(draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3))),
        tile=draw(st.sampled_from(TILES)),
        scale=draw(st.sampled_from([1.0, 0.01, 20.0])),
        offset=draw(st.sampled_from([0.0, 1.0, -50.0])),
        bias=draw(st.sampled_from([1.0, 100.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case):
    dtype = getattr(torch, case.dtype)
    x, weight, bias, *residual = make(case.operation, case.rows, case.outputs, case.inputs, seed=case.seed)
    inputs = [((x + case.offset) * case.scale).to(dtype), weight.to(dtype), (bias * case.bias).to(dtype)]
    inputs += [(t * case.scale).to(getattr(torch, case.residual_dtype)) for t in residual]
    for at, layout in zip((0, 1, 3)[: len(inputs) - 1], case.layouts):
        inputs[at] = LAYOUTS[layout](inputs[at]) if len(inputs[at]) else inputs[at]
    return inputs


@fuzz(250)
@given(cases())
def test_fuzz(case):
    inputs = build(case)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if case.tile is not None:
            patch.setattr(pointwise, "pointwise_tile", lambda *_, **__: case.tile)
        ours, simple, exact = (
            getattr(ops, case.operation)(*inputs, backend="triton"),
            plain(case.operation, *inputs),
            oracle(case.operation, *inputs),
        )
    assert ours.dtype == simple.dtype and ours.shape == exact.shape and ours.is_contiguous()
    assert_accurate(ours, simple, exact)
