"""The benchmark's cases under pytest-benchmark, for its own options and files:

    pytest bench --cases 'patch_mining/768-b1-*' 'tower/*' --benchmark-save=before
    pytest bench --cases 'patch_mining/768-b1-*' 'tower/*' --benchmark-compare

Here each provider is timed by itself: `python -m bench run` takes them in turns, flushes a GPU's cache, and measures
memory, too. For a case that measures its time itself, the plug-in's clock goes on by what the case says.
"""

import dataclasses
import functools
import statistics

import pytest
import torch

from mg_fast.testing.tolerances import ieee_float32

from .cases import all_cases
from .check import check
from .devices import check_device
from .errors import BenchError
from .registry import QUICK_PROVIDERS, Call, Case, choose
from .rows import empty_row

# For a case that measures its time itself: the plug-in cannot find out how many rounds there should be.
ROUNDS = 5


class OwnClock:
    """A timer, in seconds, that goes on by what clocked calls say they took; by the median of many requests."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, call: Call) -> None:
        self.seconds += statistics.median(call()[1]) / 1e3


OWN_CLOCK = OwnClock()


def pytest_generate_tests(metafunc):
    patterns = metafunc.config.getoption("--cases")
    try:
        device = check_device(metafunc.config.getoption("--bench-device"))
        quick = device == "cpu" and not patterns
        cases = choose(all_cases(), patterns, device, quick=quick)
    except BenchError as error:
        raise pytest.UsageError(str(error)) from None
    clock = pytest.mark.benchmark(timer=OWN_CLOCK)
    chosen = [
        pytest.param(case, name, device, id=f"{case.name}-{name}", marks=[clock] if case.clocked else [])
        for case in (case.only(QUICK_PROVIDERS) if quick else case for case in cases)
        for name in case.providers
    ]
    metafunc.parametrize(("case", "provider", "device"), chosen)


@functools.lru_cache(maxsize=1)
def inputs_of(name: str, device: str) -> tuple[object, object]:
    """A case's inputs and its exact result, shared by its providers."""
    case = all_cases()[name]
    ieee_float32()
    # Cases share their code: after eight shapes torch.compile would give up and run it eagerly.
    torch.compiler.reset()
    inputs = case.make(device)
    return inputs, case.exact(inputs) if case.exact else None


@torch.no_grad()
def test_case(case: Case, provider: str, device: str, benchmark):
    inputs, exact = inputs_of(case.name, device)
    pair = case.restricted([case.baseline, provider])
    if case.exact:
        pair = dataclasses.replace(pair, exact=lambda _: exact)
    rows = {name: empty_row(case, name) for name in pair.providers}
    call = check(pair, inputs, device, rows).get(provider)
    row = rows[provider]
    if call is None:
        (pytest.fail if row["ok"] is False else pytest.skip)(row["why"])
    benchmark.group = case.name
    told = {key: row[key] for key in ("ok", "why", "relative_error", "first_call_ms")}
    benchmark.extra_info |= {**told, "device": device}

    if case.clocked:
        benchmark.pedantic(OWN_CLOCK.advance, args=(call,), rounds=ROUNDS)
        return

    def timed():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
