"""The synchronizer by its Triton kernel, interpreted: the original's recorded cases, and the packed form."""

import pytest
import torch

from mg_fast.testing.tolerances import relative_error
from tests.synchronizers import GOLDEN_CASES, assert_golden, build, draw


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_original_s_outputs_and_gradients(golden, case):
    assert_golden(golden, case, "triton")


def test_packed_equals_unpacked():
    module = build()
    inputs = draw(module, queries=2)
    packed = module.pack()
    values = packed.values(inputs.features)
    expected = module(*inputs, backend="reference")
    ours = packed(inputs.query, values, inputs.reference_points, inputs.mask, backend="triton")
    assert relative_error(ours, expected) <= 1e-5
    assert relative_error(module(*inputs, backend="triton"), expected) <= 1e-5


def test_a_hook_runs_where_the_kernel_would_not_see_it():
    module = build()
    inputs = draw(module, queries=2)
    module.attention_weights.register_forward_hook(lambda module, args, output: output.sin())
    torch.testing.assert_close(
        module(*inputs, backend="triton"), module(*inputs, backend="reference"), rtol=0, atol=1e-5
    )
