"""Random shapes, layouts, masks and values through feature_sync's interpreted kernel keep the accuracy rule."""

from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from mg_fast.kernels import configs
from mg_fast.testing.tolerances import errors
from tests.fuzzing import assert_accurate_by_draws, fuzz
from tests.ops.feature_sync.inputs import exact, layouts, make, plain, run

NAMES = ["contiguous", *layouts(make(1, 1, 1, 1, 1, 1, ((1, 1),)))]


@fuzz(500)
@given(
    shape=st.fixed_dictionaries(
        dict(
            batch=st.sampled_from([1, 1, 1, 1, 2, 0]),
            queries=st.sampled_from([1, 1, 1, 2, 0]),
            pictures=st.sampled_from([1, 1, 2, 3, 0]),
            heads=st.sampled_from([1, 1, 1, 2]),
            # Of a few channels the largest error says little.
            channels=st.integers(4, 20),
            points=st.integers(1, 5),
            sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2).map(tuple),
        )
    ),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    query_dtype=st.sampled_from(["float32", "float32", "float16", "bfloat16"]),
    layout=st.sampled_from(NAMES),
    number=st.sampled_from(["few", "some", "many"]),
    logits=st.sampled_from([1.0, 0.0, 30.0]),
    offsets=st.sampled_from([1.0, 0.0, 4.0, 100.0]),
    ignored=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_fuzz(shape, dtype, query_dtype, layout, number, logits, offsets, ignored, seed):
    def draw(seed):
        made = make(
            **shape,
            dtype=getattr(torch, dtype),
            query_dtype=getattr(torch, query_dtype),
            logits=logits,
            offsets=offsets,
            seed=seed,
        )
        return made if ignored else made._replace(ignore=None)

    inputs = draw(seed)
    seen = inputs if layout == "contiguous" else layouts(inputs)[layout]
    with mock.patch.object(configs, "_MOST_QUERIES", {} if number == "many" else {number: 10**6}):
        ours = run(seen, "triton")
    assert ours.dtype == inputs.values.dtype and ours.shape == plain(inputs).shape
    if ours.numel() == 0:
        return

    def plain_errors(number):
        other = inputs if number == 0 else draw(seed + 10**5 * number)
        return errors(plain(other), exact(other))

    assert_accurate_by_draws(ours, exact(inputs), plain_errors)
