"""Peak memory of calls, and errors for lack of memory."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mg_fast.runtime.meter import Meter

from .registry import Call


def peak_mib(call: Call, device: str) -> float | None:
    """MiB by which a warm call's peak rises above the memory held before it (inputs, weights, packed copies)."""
    meter = Meter(device)
    with meter.stage("call"):
        out = call()
    del out
    return meter.stages[0].peak_mib


def peak_in_child(case: str, provider: str, timeout_s: float = 600) -> float | None:
    """The peak of a provider on the CPU, measured in a process of its own; None where that failed.

    No other provider has stretched the heap of that process.
    """
    words = [sys.executable, "-m", "bench", "peak", case, provider]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    return float(lines[-1]) if done.returncode == 0 and lines and lines[-1] != "unknown" else None


@contextlib.contextmanager
def memory_within_reach(device: str) -> Iterator[None]:
    """Within the block, an allocation beyond the free memory of a Linux CPU fails, as on a GPU.

    Otherwise the system would kill the process.
    """
    limit = None if device == "cuda" else _bytes_within_reach()
    if limit is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if before[1] == resource.RLIM_INFINITY else min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _bytes_within_reach() -> int | None:
    """The bytes of data that this process holds or could take; None where the system is not Linux."""
    try:
        free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    except (OSError, StopIteration):
        return None
    return (int(free.split()[1]) + int(held.split()[1])) * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
