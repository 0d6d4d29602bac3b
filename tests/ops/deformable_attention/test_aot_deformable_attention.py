"""The kernels of deformable attention compile for all architectures with no GPU: no spills, within shared memory."""

import pytest
import torch

from mg_fast.kernels import deformable_attention, deformable_attention_backward
from mg_fast.ops.ahead_of_time import compile_only
from tests.ops import ahead_of_time_checks as checks


@pytest.mark.parametrize("kernel", checks.kernels("deformable_attention"))
def test_kernel(jobs, kernel):
    checks.within_limits(jobs, kernel)


def test_resources_are_those_recorded(jobs):
    checks.resources_are_those_recorded(jobs, "deformable_attention")


def test_every_configuration_is_compiled():
    checks.every_configuration_is_compiled("deformable_attention")


def test_other_sizes_take_the_kernel_that_is_there():
    """Sides, queries, heads and pixels of 1, of a multiple of 16 and of neither have one kernel each."""

    def empty(*shape):
        return torch.empty(*shape, device="cuda")

    with compile_only(90) as compiled:
        for sides, queries, heads in (((7, 9, 3, 5), 5, 2), ((16, 32, 1, 1), 16, 16), ((1, 1, 48, 1), 1, 1)):
            pixels = sides[0] * sides[1] + sides[2] * sides[3]
            value, grad = empty(1, pixels, heads, 16), empty(1, queries, heads * 16)
            locations, weights = empty(1, queries, heads, 2, 1, 2), empty(1, queries, heads, 2, 1)
            order = torch.empty(4 * weights.numel(), device="cuda", dtype=torch.int64)
            ends = torch.empty(pixels * heads + 1, device="cuda", dtype=torch.int64)
            deformable_attention.deformable_attention_fwd(value, sides, locations, weights)
            deformable_attention_backward.deformable_attention_bwd(grad, value, sides, locations, weights, [True] * 3)
            deformable_attention_backward.sum_rows_bwd(grad, sides, locations, weights, order, ends, torch.float32)
    assert len(compiled) == 9 and len({kernel.hash for kernel in compiled}) == 3
