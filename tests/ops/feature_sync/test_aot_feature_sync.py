"""kernels/feature_sync.py compiles for all architectures with no GPU: no spills, within shared memory, as recorded."""

import pytest

from tests.ops import ahead_of_time_checks as checks


@pytest.mark.parametrize("kernel", checks.kernels("feature_sync"))
def test_kernel(jobs, kernel):
    checks.within_limits(jobs, kernel)


def test_resources_are_those_recorded(jobs):
    checks.resources_are_those_recorded(jobs, "feature_sync")


def test_every_configuration_is_compiled():
    checks.every_configuration_is_compiled("feature_sync")


def test_twins_need_the_same():
    checks.twins_need_the_same("feature_sync")
