"""Whether the providers of a case are right: each is called once and held against the exact result."""

import math
import time
from collections.abc import Callable

import torch

from mg_fast.testing.tolerances import assert_accurate, errors

from . import gpu_timing
from .registry import Call, Case, NotHere, Outputs
from .rows import why
from .watch import Watchdog

# The providers that are our kernels alone. These have no reason to return other bits when they are called again.
REPEATABLE = ("triton",)


def check(
    case: Case, inputs: object, device: str, rows: dict[str, dict], watch: Watchdog | None = None
) -> dict[str, Call]:
    """Calls each provider once, and writes into its row (see `empty_row`) how it agrees with the exact result.

    Returns:
        The warm calls of the providers that are right, or whose accuracy is unknown.

    Raises:
        GpuLost: the process can do no more on the GPU.
    """
    watch = watch or Watchdog()
    watch.begin(case.name, list(case.providers), "the exact result")
    calls, plain, exact, unknown = {}, None, None, None
    try:
        exact = case.exact(inputs) if case.exact else None
    except (RuntimeError, MemoryError) as error:
        unknown = f"accuracy unknown: the exact result: {why(error)}"
    # The baseline comes first: the errors of the others are measured by its own.
    for name in sorted(case.providers, key=lambda name: name != case.baseline):
        row = rows[name]
        watch.begin(case.name, [name], "its first call")
        try:
            call, outputs, row["first_call_ms"] = first_call(lambda name=name: case.providers[name](inputs), device)
            outputs = several(outputs[0] if case.clocked else outputs)
            if name == case.baseline:
                plain = outputs
            if exact is None:
                row["why"] = unknown
            elif plain is None:
                row["why"] = f"accuracy unknown: {case.baseline} gave no result to compare with"
            else:
                _compare(outputs, plain, several(exact), row)
            if device == "cuda" and not case.clocked:
                row["equal_bits"] = gpu_timing.same_bits(call, outputs)
                if name in REPEATABLE:
                    assert row["equal_bits"], "other bits when it was called again with the same inputs"
            calls[name] = call
        except NotHere as reason:
            row["why"] = f"not here: {reason}"
        except AssertionError as error:
            row["ok"], row["why"] = False, f"wrong result: {error}"
        except Exception as error:
            # An opponent that breaks is reported, and the run goes on.
            row["ok"], row["why"] = False, why(error)
        if row["ok"] is False:
            outputs = None
            gpu_timing.recover(device)
    return calls


def first_call(build: Callable[[], Call], device: str) -> tuple[Call, object, float]:
    """The call, its first result, and the milliseconds that both took, with compiling, packing and making tables."""
    began = time.perf_counter()
    call = build()
    out = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return call, out, 1e3 * (time.perf_counter() - began)


def _compare(outputs: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor], row: dict) -> None:
    """Holds outputs against the exact ones by the tests' rule; raises AssertionError where they break it."""
    shapes, expected = [list(out.shape) for out in outputs], [list(out.shape) for out in exact]
    assert shapes == expected, f"shapes {shapes}, expected {expected}"
    error = max(errors(out, truth)[0] for out, truth in zip(outputs, exact))
    assert math.isfinite(error), "not a number, or infinite"
    row["relative_error"] = error
    for out, baseline, truth in zip(outputs, plain, exact):
        assert_accurate(out, baseline, truth)
    row["ok"] = True


def several(outputs: Outputs) -> list[torch.Tensor]:
    """The outputs of a provider as a list."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
