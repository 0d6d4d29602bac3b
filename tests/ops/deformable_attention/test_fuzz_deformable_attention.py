"""Random shapes, layouts and values through the interpreted kernels of deformable_attention keep the accuracy rule."""

import contextlib
import functools
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.cases.settings import deterministic
from mg_fast import ops
from mg_fast.testing.tolerances import errors
from tests import draws
from tests.fuzzing import assert_accurate_by_draws, fuzz
from tests.ops.deformable_attention.test_deformable_attention import exact, gradients, layouts, make, plain

NAMES = ["contiguous", *layouts(torch.zeros(1, 1, 1, 1))]


class Case(NamedTuple):
    """One draw, in which the seed decides everything that is not named here."""

    batch: int
    queries: int
    heads: int
    channels: int
    points: int
    levels: tuple[tuple[int, int], ...]
    dtype: str
    narrow: bool
    layout: str
    scale: float
    seed: int


@st.composite
def cases(draw, smaller=False):
    """Draws of a case; the smaller ones have maps of few pixels, each of which is a program of the sorted sum."""
    sides = st.integers(1, 3 if smaller else 6)
    return Case(
        # Every sample of an interpreted program takes milliseconds, so there are few of them.
        batch=draw(st.sampled_from([1, 1, 1, 1, 2])),
        queries=draw(st.integers(1, 4)),
        heads=draw(st.sampled_from([1, 1, 1, 2, 3])),
        # Over a handful of numbers the largest error says little.
        channels=draw(st.integers(8, 20) | st.sampled_from([32, 33, 64])),
        points=draw(st.sampled_from([1, 1, 1, 2, 3])),
        levels=tuple(draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=2))),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        narrow=draw(st.booleans()),
        layout=draw(st.sampled_from(NAMES)),
        scale=draw(st.sampled_from([1.0, 0.01, 50.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: Case, draw: int = 0):
    """The operation's arguments; if `narrow`, weights have the dtype of values."""
    value, levels, locations, weights = make(
        case.queries,
        case.heads,
        case.channels,
        case.points,
        case.levels,
        batch=case.batch,
        seed=case.seed + 10**5 * draw,
    )
    dtype = getattr(torch, case.dtype)
    value = (value * case.scale).to(dtype)
    if case.layout != "contiguous":
        value = layouts(value)[case.layout]
    return value, levels, locations, weights.to(dtype) if case.narrow else weights


def kernel(*inputs):
    return ops.deformable_attention(*inputs, backend="triton")


@fuzz(400)
@given(cases())
def test_forward(case):
    inputs = build(case)
    ours = kernel(*inputs)
    assert ours.dtype == inputs[0].dtype

    def plain_errors(draw):
        others = build(case, draw)
        return errors(plain(*others), exact(*others))

    assert_accurate_by_draws(ours, exact(*inputs), plain_errors)


@fuzz(100)
@given(cases(smaller=True), st.booleans())
def test_gradients(case, sorting):
    @functools.cache
    def found(call, draw):
        inputs = build(case, draw)
        upstream = draws.normal(case.seed + draw, case.batch, case.queries, case.heads * case.channels)
        return gradients(call, inputs, upstream.to(inputs[0].dtype))

    with deterministic() if sorting else contextlib.nullcontext():
        ours = found(kernel, 0)
    for i in range(3):
        assert_accurate_by_draws(
            ours[i], found(exact, 0)[i], lambda draw, i=i: errors(found(plain, draw)[i], found(exact, draw)[i])
        )
