"""Clocks and memory, on a GPU and on a CPU.

On a CPU other work comes and goes, and the clock rate with it: calls to be compared are timed in turns and the ratio is
taken within each turn, so that drift hits both; turns in which other processes took much of the machine are left out,
as threads that wait for each other suffer from it many times over, and more where there are more of them; and the
turns' first half is held against the second. On a GPU time is taken on the device, with the second-level cache flushed.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mg_fast.runtime import cpu_dtype
from mg_fast.runtime.meter import Meter

from .registry import Call, Ceilings

# two halves of a comparison that differ by more than this are reported
STEADY = 0.10
# a turn in which other processes took a larger part of the machine's CPU time is left out
BUSY = 0.10
# of all calls of a turn together: shorter ones are repeated, as the system counts CPU time in hundredths of a second
SHORTEST_TURN_S = 0.3
# larger than the second-level cache of any GPU
FLUSHED_BYTES = 2**28


class GpuLost(RuntimeError):
    """After this the process can do no more on its GPU: its context is broken; or a capture failed, within which
    torch's random generator and allocator then stay."""


@dataclass
class Timing:
    """Of one provider, in milliseconds.

    Attributes:
        samples: of a call each, on a CPU a mean over one turn (clocked: all that the turns' calls gave); on a GPU with
            the cache flushed.
        warm_ms: median without flushing; None on a CPU.
        ratios: the baseline's sample over ours, turn by turn; on a GPU of medians, pass by pass.
        left_out: turns that were disturbed, and are not among the samples.
        others: the part of the machine's CPU time that other processes took, median of the samples' turns; None where
            it is not known.
    """

    samples: list[float] = field(default_factory=list)
    warm_ms: float | None = None
    ratios: list[float] = field(default_factory=list)
    left_out: int = 0
    others: float | None = None


class Others:
    """What part of the machine's CPU time other processes take, from one call to the next; None where the system does
    not tell.
    """

    def __init__(self):
        self._before = self._read()

    def share(self) -> float | None:
        before, self._before = self._before, self._read()
        if before is None or self._before is None:
            return None
        busy, own, idle = (after - earlier for after, earlier in zip(self._before, before))
        return max(0.0, busy - own) / max(busy + idle, 1e-9)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of CPU time since the machine began: of all processes and of other machines on it; of this process;
        of nobody.
        """
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = (
            ticks / os.sysconf("SC_CLK_TCK") for ticks in fields
        )
        return user + nice + system + interrupts + soft_interrupts + stolen, time.process_time(), idle + waiting


def quantile(values: list[float], fraction: float) -> float:
    """The value at a fraction of the sorted ones, by linear interpolation."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def halves_differ(ratios: list[float], least: int = 4) -> float | None:
    """By how much the median ratio of the first half of the turns and that of the second differ; None for fewer turns
    than `least`.
    """
    if len(ratios) < least:
        return None
    first, second = statistics.median(ratios[: len(ratios) // 2]), statistics.median(ratios[len(ratios) // 2 :])
    return max(first, second) / min(first, second) - 1


def time_in_turns(
    calls: Mapping[str, Call],
    baseline: str,
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    others: Callable[[], float | None] | None = None,
    least_turns: int = 4,
    most_turns: int = 40,
    clocked: bool = False,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Times warm calls on a CPU in turns, every other turn in reverse.

    It ends when the time is spent, `least_turns` were undisturbed and the halves agree; or when twice the time is
    spent, or `most_turns` are taken. Where fewer than two were undisturbed, all of them count.

    Args:
        clock: seconds.
        others: as `Others.share`; the default is that.
        clocked: calls return their own milliseconds beside their outputs, see `Case`; a turn's ratio is that of its
            medians.
        begin: called with the name of every call before it is timed.
    """
    if not calls:
        return {}
    others = others or Others().share
    repeats = (
        {} if clocked else {name: _repeats(call, SHORTEST_TURN_S / len(calls), clock) for name, call in calls.items()}
    )
    turns: list[dict[str, list[float]]] = []
    shares: list[float | None] = []
    others()
    began = clock()
    for turn in range(most_turns):
        samples = {}
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            begin(name)
            samples[name] = calls[name]()[1] if clocked else [_mean_ms(calls[name], repeats[name], clock)]
        turns.append(samples)
        shares.append(others())
        spent = clock() - began
        timings = _timings(turns, shares, baseline)
        if len(turns) >= least_turns and spent >= 2 * seconds:
            break
        counted = [
            len(turns) - timing.left_out >= least_turns and (timing.others or 0) <= BUSY for timing in timings.values()
        ]
        if spent >= seconds and all(counted):
            differences = [halves_differ(timing.ratios) for name, timing in timings.items() if name != baseline]
            if all(difference is None or difference <= STEADY for difference in differences):
                break
    return timings


def _mean_ms(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return 1e3 * (clock() - start) / repeats


def _timings(turns: list[dict[str, list[float]]], shares: list[float | None], baseline: str) -> dict[str, Timing]:
    undisturbed = [i for i, share in enumerate(shares) if share is None or share <= BUSY]
    kept = undisturbed if len(undisturbed) > 1 else list(range(len(turns)))
    known = [shares[i] for i in kept if shares[i] is not None]
    timings = {}
    for name in turns[0]:
        samples = [sample for i in kept for sample in turns[i][name]]
        ratios = (
            [statistics.median(turns[i][baseline]) / statistics.median(turns[i][name]) for i in kept]
            if baseline in turns[0]
            else []
        )
        others = statistics.median(known) if known else None
        timings[name] = Timing(samples, ratios=ratios, left_out=len(turns) - len(kept), others=others)
    return timings


def _repeats(call: Call, seconds: float, clock: Callable[[], float]) -> int:
    began = clock()
    call()
    return max(1, round(seconds / max(clock() - began, 1e-6)))


def time_in_passes(
    calls: Mapping[str, Call], baseline: str, seconds: float, begin: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Times warm calls on a GPU in two passes, the second in reverse, so that a drift of its clocks shows.

    Args:
        seconds: of device time for each call, about.
        begin: called with the name of every call before it is timed.
    """
    passes = []
    for names in (list(calls), list(calls)[::-1]):
        timings = {}
        for name in names:
            begin(name)
            timings[name] = time_on_gpu(calls[name], seconds / 2)
        passes.append(timings)
    merged = {}
    for name in calls:
        first, second = (timings[name] for timings in passes)
        ratios = []
        if baseline in calls:
            ratios = [
                statistics.median(timings[baseline].samples) / statistics.median(timings[name].samples)
                for timings in passes
            ]
        merged[name] = Timing(
            first.samples + second.samples, warm_ms=(first.warm_ms + second.warm_ms) / 2, ratios=ratios
        )
    return merged


def time_on_gpu(call: Call, seconds: float) -> Timing:
    """Times a call by CUDA events, with what the host takes to launch it: of a short one that is all there is to see.

    Args:
        seconds: of device time, about.
    """
    # what is compiled, tabled or recorded on the way is so by the third call
    for _ in range(3):
        call()
    timing = Timing(samples=_event_times(call, seconds / 2, flush=True))
    timing.warm_ms = statistics.median(_event_times(call, seconds / 2, flush=False))
    return timing


def time_graph(call: Call, seconds: float) -> float:
    """Median of a warm call's replay as a CUDA graph, in milliseconds, the cache flushed; the host has no part in it.

    Raises:
        GpuLost: it could not be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # what is made in a first call on another stream must not be made within the graph
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        raise GpuLost(
            f"it cannot be captured: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return statistics.median(_event_times(graph.replay, seconds, flush=True))


def same_bits(call: Call, outputs: Sequence[torch.Tensor], repeats: int = 3) -> bool:
    """Whether further calls return the very same bits, NaN included: a kernel whose threads race seldom does."""
    for _ in range(repeats):
        again = call()
        again = [again] if isinstance(again, torch.Tensor) else again
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(again, outputs, strict=True)):
            return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _event_times(call: Call, seconds: float, *, flush: bool) -> list[float]:
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


def first_call(build: Callable[[], Call], device: str) -> tuple[Call, object, float]:
    """A call, what it returns first, and how many milliseconds building and calling it took: with what is compiled,
    tabled or packed.
    """
    began = time.perf_counter()
    call = build()
    out = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return call, out, 1e3 * (time.perf_counter() - began)


def peak_mib(call: Call, device: str) -> float | None:
    """MiB that a warm call's peak rises above what is held before it: inputs, weights, what was packed."""
    meter = Meter(device)
    with meter.stage("call"):
        out = call()
    del out
    return meter.stages[0].peak_mib


def peak_in_child(case: str, provider: str, timeout_s: float = 600) -> float | None:
    """The same of a provider on the CPU, in a process of its own, whose heap no other provider has stretched; None
    where it failed.
    """
    words = [sys.executable, "-m", "bench", "peak", case, provider]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    return float(lines[-1]) if done.returncode == 0 and lines and lines[-1] != "unknown" else None


def measure_ceilings(device: str) -> Ceilings:
    """What a copy and a large matrix product reach here, in about two seconds."""
    if device == "cuda":
        elements, side, dtypes = 2**30, 8192, (torch.float32, torch.bfloat16, torch.float16)
    else:
        # products in a dtype that a CPU has no arithmetic for are many times slower, a minute of it, and nobody's
        # ceiling
        elements, side, dtypes = 2**27, 1536, (torch.float32, *cpu_dtype.fast_dtypes())
    source = torch.ones(elements, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * elements / _best_seconds(lambda: target.copy_(source), device) / 1e9
    products = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 / _best_seconds(lambda a=a: a @ a, device) / 1e12
    return Ceilings(round(copy, 2), {dtype: round(value, 4) for dtype, value in products.items()})


def keep_busy(seconds: float) -> float:
    """Has a GPU multiply matrices for so long, and returns the time of `time.monotonic` from which on its clocks were
    those under load.
    """
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        a @ a
        torch.cuda.synchronize()
    # clocks take a moment to rise
    return began + seconds / 3


def _best_seconds(call: Callable[[], object], device: str) -> float:
    """The best of several: a ceiling is what the machine can, not what it does on average."""
    call()
    if device == "cuda":
        return min(_event_times(call, 0.2, flush=False)) / 1e3
    times = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@contextlib.contextmanager
def memory_within_reach(device: str):
    """On Linux CPUs an allocation beyond what is free fails within the block, as on a GPU, and does not have the
    process killed.
    """
    try:
        import resource

        free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    except (ImportError, OSError, StopIteration):
        yield
        return
    if device == "cuda":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = (int(free.split()[1]) + int(held.split()[1])) * 1024
    resource.setrlimit(
        resource.RLIMIT_DATA, (most if before[1] == resource.RLIM_INFINITY else min(most, before[1]), before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def why_lost() -> str | None:
    """Why this process can do no more on its GPU, where a kernel has broken its context; None where it still can.

    An illegal access, as an example, comes back from every later call.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU's context is lost: {str(error).splitlines()[0]}"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
