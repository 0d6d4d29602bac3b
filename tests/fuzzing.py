"""Chooses how many random cases a test tries, and which."""

import os
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, Phase, settings

from mg_fast.testing.tolerances import assert_accurate


def fuzz(examples: int) -> settings:
    """Settings for that many cases in CI, and for twenty times as many with `make fuzz` (MG_FAST_FUZZ=fuzz)."""
    # Large examples take long, so there is no deadline. A test's fixtures serve all of its examples.
    common = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    if os.environ.get("MG_FAST_FUZZ") == "fuzz":
        return settings(max_examples=20 * examples, phases=[Phase.reuse, Phase.generate, Phase.shrink], **common)
    # The cases are the same every time, so that only a change in the code can break a build. Shrinking a failing case
    # would take minutes.
    return settings(max_examples=examples, derandomize=True, database=None, phases=[Phase.generate], **common)


def assert_accurate_by_draws(
    ours: torch.Tensor, oracle: torch.Tensor, plain_errors: Callable[[int], tuple[float, float]]
) -> None:
    """Asserts the accuracy rule for a result, with the plain form at its worst of eight draws.

    The plain form's error on a single small input is a matter of luck. Most results are right by the first draw, and
    more draws only raise the bound, so the others are made only for a result that would fail.

    Args:
        plain_errors: the `errors` of the plain form in a draw, which is a number from 0 on.
    """
    found = []
    for draw in range(8):
        found.append(plain_errors(draw))
        try:
            return assert_accurate(ours, found, oracle)
        except AssertionError:
            if draw == 7:
                raise
