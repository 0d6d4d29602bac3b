"""The time of one call, kernel by kernel, as torch.profiler sees it."""

import statistics
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .registry import Call

# How many calls are profiled.
CALLS = 5
# How many kernels are kept by name; the others are added up.
MOST_KERNELS = 60
# How much of a kernel's name is kept: templates of C++ run to thousands of characters.
MOST_CHARACTERS = 120


def kernel_table(call: Call, device: str) -> dict:
    """Profiles warm calls. On a CPU the table holds torch's operators, since there are no kernels.

    Returns:
        `wall_us`: the time from the start of a call's first kernel to the end of its last one, median of `CALLS`, which
        leaves out what the host does before; on a CPU the whole call; None where the profiler did not see the same
        kernels in every call.
        `busy_us`: the sum of the kernels' own times: more than `wall_us` where some run at the same time, less where
        there are gaps.
        `launches`: kernels, copies and fills of a call.
        `kernels`: sorted by time, each with `name`, `launches` and `us` of one call.
    """
    for _ in range(3):
        call()
    on_gpu = device == "cuda"
    walls = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # There is one cycle of profiling; without the option torch warns that it would drop all others.
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(CALLS):
            began = time.perf_counter()
            call()
            if on_gpu:
                # The kernels of one call end before those of the next one begin.
                torch.cuda.synchronize()
            walls.append(1e6 * (time.perf_counter() - began))
    if on_gpu:
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        walls = spans([(event.time_range.start, event.time_range.end) for event in events], CALLS)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == kind and us > 0:
            rows.append(_row(event.key[:MOST_CHARACTERS], event.count / CALLS, us / CALLS))
    rows.sort(key=lambda row: -row["us"])
    first, others = rows[:MOST_KERNELS], rows[MOST_KERNELS:]
    launches, busy = (sum(row[key] for row in rows) for key in ("launches", "us"))
    if others:
        rest = (sum(row[key] for row in others) for key in ("launches", "us"))
        first.append(_row(f"{len(others)} others", *rest))
    wall = round(statistics.median(walls), 1) if walls else None
    return {"wall_us": wall, "busy_us": round(busy, 1), "launches": launches, "kernels": first}


def _row(name: str, launches: float, us: float) -> dict:
    return {"name": name, "launches": launches, "us": round(us, 2)}


def spans(times: list[tuple[float, float]], calls: int) -> list[float]:
    """How long each of several equal calls took, from the start of its first kernel to the end of its last one.

    `times` are starts and ends of the kernels of all calls, which do not overlap. Nothing is returned where their
    number is not a multiple of the number of calls.
    """
    if not times or len(times) % calls:
        return []
    size, ordered = len(times) // calls, sorted(times)
    shares = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [max(end for _, end in share) - share[0][0] for share in shares]
