"""Times of calls on a GPU, taken on the device by CUDA events, with the second-level cache flushed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from .measure import Timing
from .registry import Call

# This is larger than the second-level cache of any GPU.
FLUSHED_BYTES = 2**28


class GpuLost(RuntimeError):
    """The process can do no more on its GPU.

    The GPU's context is broken; or a capture failed, after which torch's random generator and allocator stay as they
    were within the capture.
    """


def time_in_passes(
    calls: Mapping[str, Call], baseline: str, seconds: float, begin: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Times warm calls in two passes, the second in reverse order, so that a drift of the GPU's clocks shows.

    Args:
        seconds: of device time for each call, about.
        begin: called with the name of every call before it is timed.
    """
    passes: list[dict[str, Timing]] = [{}, {}]
    for timings, names in zip(passes, (list(calls), list(calls)[::-1])):
        for name in names:
            begin(name)
            timings[name] = time_on_gpu(calls[name], seconds / 2)
    medians = [{name: statistics.median(timing.samples) for name, timing in timings.items()} for timings in passes]
    merged = {}
    for name in calls:
        first, second = (timings[name] for timings in passes)
        ratios = [by_name[baseline] / by_name[name] for by_name in medians] if baseline in calls else []
        merged[name] = Timing(first.samples + second.samples, (first.warm_ms + second.warm_ms) / 2, ratios)
    return merged


def time_on_gpu(call: Call, seconds: float) -> Timing:
    """Times a call, including the host's time to launch it, which is nearly all of the time of a short call."""
    # After three calls everything is compiled, and all tables and graphs are made.
    for _ in range(3):
        call()
    samples = event_times(call, seconds / 2, flush=True)
    return Timing(samples, warm_ms=statistics.median(event_times(call, seconds / 2, flush=False)))


def time_graph(call: Call, seconds: float) -> float:
    """The median of a warm call's replay as a CUDA graph, in milliseconds, with the cache flushed, without the host.

    Raises:
        GpuLost: the call could not be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # The first call on a new stream makes workspaces and tables, which must not happen within the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GpuLost(f"it cannot be captured: {told}") from error
    return statistics.median(event_times(graph.replay, seconds, flush=True))


def event_times(call: Call, seconds: float, *, flush: bool) -> list[float]:
    """The milliseconds of 5 to 200 calls, as many as fit into the time."""
    cache = torch.empty(FLUSHED_BYTES if flush else 0, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(5, min(200, int(seconds / max(time.perf_counter() - began, 1e-5))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        if flush:
            cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def same_bits(call: Call, outputs: Sequence[torch.Tensor], repeats: int = 3) -> bool:
    """Whether further calls return the very same bits, NaN included. A kernel whose threads race seldom does."""
    for _ in range(repeats):
        again = call()
        again = [again] if isinstance(again, torch.Tensor) else again
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(again, outputs, strict=True)):
            return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def why_lost() -> str | None:
    """Why this process can do no more on its GPU, as after an illegal access by a kernel; None where it still can."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU's context is lost: {str(error).splitlines()[0]}"
    return None


def recover(device: str) -> None:
    """Frees what a failed call held on the GPU; raises GpuLost if everything after it would fail, too."""
    if device != "cuda":
        return
    if lost := why_lost():
        raise GpuLost(lost)
    torch.cuda.empty_cache()
