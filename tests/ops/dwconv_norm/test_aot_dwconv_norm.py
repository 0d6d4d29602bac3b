"""kernels/dwconv_norm.py compiles for all architectures with no GPU: no spills, within shared memory, as recorded."""

import pytest

from tests.ops import ahead_of_time_checks as checks


@pytest.mark.parametrize("kernel", checks.kernels("dwconv_norm"))
def test_kernel(jobs, kernel):
    checks.within_limits(jobs, kernel)


def test_resources_are_those_recorded(jobs):
    checks.resources_are_those_recorded(jobs, "dwconv_norm")


def test_every_configuration_is_compiled():
    checks.every_configuration_is_compiled("dwconv_norm")


def test_twins_need_the_same():
    checks.twins_need_the_same("dwconv_norm")
