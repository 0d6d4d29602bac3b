"""The benchmark's cases under pytest-benchmark, for its own options and files:

    pytest bench --cases 'mining/768-b1-*' 'tower/*' --benchmark-save=before
    pytest bench --cases 'mining/768-b1-*' 'tower/*' --benchmark-compare

Here each provider is timed by itself: `python -m bench run` takes them in turns, flushes a GPU's cache, and measures memory too.
"""

import dataclasses
import functools

import pytest
import torch

from .cases import all_cases
from .registry import QUICK_PROVIDERS, Case, UnknownCase, choose
from .run import NoDevice, check, check_device, empty_row


def pytest_generate_tests(metafunc):
    patterns = metafunc.config.getoption("--cases")
    try:
        device = check_device(metafunc.config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        quick = device == "cpu" and not patterns
        cases = choose(all_cases(), patterns, device, quick=quick)
    except (NoDevice, UnknownCase) as error:
        raise pytest.UsageError(str(error)) from None
    pairs = [(case, provider) for case in (case.only(QUICK_PROVIDERS) if quick else case for case in cases) for provider in case.providers]
    names = [f"{case.name}-{provider}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider", "device"), [(*pair, device) for pair in pairs], ids=names)


@functools.lru_cache(maxsize=1)
def inputs_of(name: str, device: str) -> tuple[object, object]:
    """A case's inputs and its exact result, shared by its providers."""
    case = all_cases()[name]
    # cases share their code: after eight shapes torch.compile would give up and run it eagerly
    torch._dynamo.reset()
    inputs = case.make(device)
    return inputs, case.exact(inputs) if case.exact else None


@torch.no_grad()
def test_case(case: Case, provider: str, device: str, benchmark):
    inputs, exact = inputs_of(case.name, device)
    pair = dataclasses.replace(
        case,
        providers={name: case.providers[name] for name in (case.baseline, provider)},
        exact=(lambda _: exact) if case.exact else None,
    )
    rows = {name: empty_row(case, name) for name in pair.providers}
    call = check(pair, inputs, device, rows).get(provider)
    row = rows[provider]
    if call is None:
        (pytest.fail if row["ok"] is False else pytest.skip)(row["why"])
    benchmark.group = case.name
    benchmark.extra_info |= {key: row[key] for key in ("ok", "why", "relative_error", "first_call_ms")} | {"device": device}

    def timed():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
