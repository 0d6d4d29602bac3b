"""Random shapes, layouts and values through dwconv_norm's interpreted kernel keep the accuracy rule."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mg_fast import ops
from mg_fast.testing.tolerances import errors
from tests.fuzzing import assert_accurate_by_draws, fuzz
from tests.ops.dwconv_norm.test_dwconv_norm import exact, layouts, make, plain

NAMES = ["contiguous", *layouts(torch.zeros(1, 1, 1, 1))]


@fuzz(250)
@given(
    # At least 8 channels: LayerNorm may all but cancel a handful of numbers, and the largest error then says little.
    # In 16 bits tensor cores convolve multiples of 16.
    shape=st.tuples(
        st.sampled_from([1, 1, 1, 1, 1, 2, 0]),
        st.integers(1, 8),
        st.integers(1, 5),
        st.one_of(st.integers(8, 40), st.sampled_from([16, 32, 48])),
    ),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    layout=st.sampled_from(NAMES),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    scale=st.sampled_from([1.0, 0.05, 20.0]),
    eps=st.sampled_from([1e-6, 1e-5]),
    seed=st.integers(0, 2**16),
)
def test_fuzz(shape, dtype, layout, offset, scale, eps, seed):
    x, *rest = make(shape, getattr(torch, dtype), offset, scale, seed)
    seen = x if layout == "contiguous" else layouts(x)[layout]
    ours = ops.dwconv_norm(seen, *rest, eps, backend="triton")
    assert ours.dtype == x.dtype and ours.shape == x.shape
    if x.numel() == 0:
        return

    def plain_errors(draw):
        inputs = make(shape, getattr(torch, dtype), offset, scale, seed + 10**5 * draw)
        return errors(plain(*inputs, eps=eps), exact(*inputs, eps=eps))

    assert_accurate_by_draws(ours, exact(x, *rest, eps=eps), plain_errors)
