"""Chooses how many random cases a test tries, and which."""

import os

from hypothesis import HealthCheck, Phase, settings


def fuzz(examples: int) -> settings:
    """Settings for that many cases in CI, and for twenty times as many with `make fuzz` (MG_FAST_FUZZ=fuzz)."""
    # Large examples take long, so there is no deadline. A test's fixtures serve all of its examples.
    common = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    if os.environ.get("MG_FAST_FUZZ") == "fuzz":
        return settings(max_examples=20 * examples, phases=[Phase.reuse, Phase.generate, Phase.shrink], **common)
    # The cases are the same every time, so that only a change in the code can break a build. Shrinking a failing case
    # would take minutes.
    return settings(max_examples=examples, derandomize=True, database=None, phases=[Phase.generate], **common)
