"""What the machine reaches: the speed of a copy and of large matrix products."""

import time
from collections.abc import Callable

import torch

from mg_fast.ops.operation import product_flop
from mg_fast.runtime import cpu_dtype

from .gpu_timing import event_times
from .registry import Ceilings, dtype_name


def measure_ceilings(device: str) -> Ceilings:
    """What a copy and a large matrix product reach here, measured in about two seconds."""
    if device == "cuda":
        elements, side, dtypes = 2**30, 8192, (torch.float32, torch.bfloat16, torch.float16)
    else:
        # In a dtype that the CPU has no arithmetic for, a product would take a minute and show no limit of the machine.
        elements, side, dtypes = 2**27, 1536, (torch.float32, *cpu_dtype.fast_dtypes())
    source = torch.ones(elements, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * elements / _best_seconds(lambda: target.copy_(source), device) / 1e9
    products = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        flops = product_flop(side, side, side) / _best_seconds(lambda a=a: a @ a, device)
        products[dtype_name(dtype)] = flops / 1e12
    return Ceilings(round(copy, 2), {dtype: round(value, 4) for dtype, value in products.items()})


def _best_seconds(call: Callable[[], object], device: str) -> float:
    """The shortest of several times: a ceiling is what the machine can do, and not what it does on average."""
    call()
    if device == "cuda":
        return min(event_times(call, 0.2, flush=False)) / 1e3
    times = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def keep_busy(seconds: float) -> float:
    """Lets a GPU multiply matrices; returns the value of `time.monotonic` from which on it ran as under load."""
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        a @ a
        torch.cuda.synchronize()
    # The clocks take a moment to rise.
    return began + seconds / 3
