"""The registry: what users run first, stress shapes last."""

from ..registry import Case


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order in which they are run."""
    from . import end_to_end, kernels, patch_mining, picture, pixels, stress, towers

    cases = [
        *patch_mining.cases(),
        *towers.cases(),
        *picture.cases(),
        *pixels.cases(),
        *kernels.cases(),
        *end_to_end.cases(),
        *stress.cases(),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return {case.name: case for case in cases}
