"""Where the time of one call goes, kernel by kernel, as torch.profiler sees it."""

import statistics
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .registry import Call

# calls that are profiled, and calls that are timed without the profiler
CALLS = 5
# kernels that are kept by name; the others are added up
MOST_KERNELS = 60
# of a kernel's name: templates of C++ run to thousands of characters
MOST_CHARACTERS = 120


def kernel_table(call: Call, device: str) -> dict:
    """Profiles warm calls. On a CPU the table holds torch's operators, since there are no kernels.

    Returns:
        `wall_us`: a call's time without the profiler, from the first kernel's start to the last one's end, median of `CALLS`;
        `busy_us`: the kernels' own times, added up: more than `wall_us` where some run at the same time, less where there are gaps;
        `launches`: kernels, copies and fills of a call;
        `kernels`: by time, each with `name`, `launches` and `us` of one call.
    """
    for _ in range(3):
        call()
    wall = statistics.median(_wall_us(call, device) for _ in range(CALLS))
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # one cycle; without the option torch warns that it would drop all others
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == kind and us > 0:
            rows.append({"name": event.key[:MOST_CHARACTERS], "launches": event.count / CALLS, "us": round(us / CALLS, 2)})
    rows.sort(key=lambda row: -row["us"])
    kept, others = rows[:MOST_KERNELS], rows[MOST_KERNELS:]
    if others:
        kept.append(
            {
                "name": f"{len(others)} others",
                "launches": sum(row["launches"] for row in others),
                "us": round(sum(row["us"] for row in others), 2),
            }
        )
    return {
        "wall_us": round(wall, 1),
        "busy_us": round(sum(row["us"] for row in rows), 1),
        "launches": sum(row["launches"] for row in rows),
        "kernels": kept,
    }


def _wall_us(call: Call, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)
