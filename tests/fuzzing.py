"""How many random cases a test tries, and which."""

import os

from hypothesis import HealthCheck, Phase, settings


def fuzz(examples: int) -> settings:
    """Settings for that many cases in CI, and twenty times as many by `make fuzz` (MG_FAST_FUZZ=fuzz)."""
    # an example takes as long as it is large, and every test's fixtures serve all of its examples
    common = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    if os.environ.get("MG_FAST_FUZZ") == "fuzz":
        return settings(max_examples=20 * examples, phases=[Phase.reuse, Phase.generate, Phase.shrink], **common)
    # the same every time: what breaks a build is a change; not made smaller, which takes minutes
    return settings(max_examples=examples, derandomize=True, database=None, phases=[Phase.generate], **common)
