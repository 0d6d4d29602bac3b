"""Random small packed towers agree with transformers' own, over widths, depths, hidden states and batch sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzzing import fuzz
from tests.modules.test_clip import DTYPES, check, make


@pytest.mark.slow
@fuzz(250)
@given(
    seed=st.integers(0, 2**16),
    heads=st.integers(1, 3),
    head=st.integers(1, 9),
    hidden=st.integers(1, 40),
    layers=st.integers(1, 3),
    grid=st.integers(1, 4),
    patch=st.integers(1, 3),
    batch=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_fuzz(seed, heads, head, hidden, layers, grid, patch, batch, dtype, data):
    tower = make(
        dtype, seed=seed, width=heads * head, heads=heads, layers=layers, hidden=hidden, image=grid * patch, patch=patch
    )
    select_layer = data.draw(st.integers(-layers - 1, layers))
    check(tower, torch.randn(batch, 3, grid * patch, grid * patch), select_layer)
