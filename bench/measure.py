"""Times of calls on a CPU, taken in turns.

On a CPU other work comes and goes, and the clock rate changes with it; docs/benchmarks.md ("How it measures") says how
turns, ratios within turns, and leaving out disturbed turns answer that.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import psutil

from .registry import Call

# Two halves of a comparison that differ by more than this are reported.
STEADY = 0.10
# A turn is left out where other processes took a larger part of the machine's CPU time.
BUSY = 0.10
# Seconds of all calls of a turn together. Shorter calls are repeated, since the system counts CPU time in hundredths of
# a second.
SHORTEST_TURN_S = 0.3


@dataclass
class Timing:
    """The times of one provider, in milliseconds.

    Attributes:
        samples: on a CPU one for each turn, the mean of its calls (clocked: all times that the turns' calls gave); on a
            GPU one for each call, with the cache flushed.
        warm_ms: the median without flushing; None on a CPU.
        ratios: the baseline's sample over the provider's, turn by turn; on a GPU of medians, pass by pass.
        left_out: how many turns were disturbed and are not among the samples.
        others: the part of the machine's CPU time that other processes took, the median of the samples' turns; None
            where it is not known.
    """

    samples: list[float] = field(default_factory=list)
    warm_ms: float | None = None
    ratios: list[float] = field(default_factory=list)
    left_out: int = 0
    others: float | None = None


class Others:
    """The part of the machine's CPU time that other processes took since the last question."""

    def __init__(self):
        self._before = self._read()

    def share(self) -> float:
        before, self._before = self._before, self._read()
        busy, own, idle = (after - earlier for after, earlier in zip(self._before, before))
        return max(0.0, busy - own) / max(busy + idle, 1e-9)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of CPU time: busy (also by other virtual machines), of this process, idle."""
        times = psutil.cpu_times()._asdict()
        idle = times.pop("idle") + times.pop("iowait", 0)
        # Linux counts the time of its guests as time of users, too.
        busy = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))
        return busy, time.process_time(), idle


def quantile(values: list[float], fraction: float) -> float:
    """The value at a fraction of the sorted values, by linear interpolation."""
    return float(np.quantile(values, fraction))


def halves_differ(ratios: list[float], least: int = 4) -> float | None:
    """By how much the median ratios of the two halves of the turns differ; None for fewer turns than `least`."""
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
    """Times warm calls on a CPU in turns, every other turn in reverse order.

    It ends when the time is spent, `least_turns` were undisturbed and the halves agree; or when twice the time is
    spent, or `most_turns` are taken. Where fewer than two turns were undisturbed, all of them count.

    Args:
        others: as `Others.share`, which is the default.
        clocked: the calls return their own milliseconds beside their outputs, see `Case`; the ratio of a turn is then
            the ratio of its medians.
        begin: called with the name of every call before it is made.
    """
    if not calls:
        return {}
    others = others or Others().share
    repeats: dict[str, int] = {}
    for name in () if clocked else calls:
        begin(name)
        call_s = _mean_ms(calls[name], 1, clock) / 1e3
        repeats[name] = max(1, round(SHORTEST_TURN_S / len(calls) / max(call_s, 1e-6)))
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
        # All providers have the same turns.
        undisturbed, others_took = len(turns) - timings[name].left_out, timings[name].others or 0
        if spent >= seconds and undisturbed >= least_turns and others_took <= BUSY:
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
    counted = undisturbed if len(undisturbed) > 1 else list(range(len(turns)))
    known = [shares[i] for i in counted if shares[i] is not None]
    others = statistics.median(known) if known else None
    timings = {}
    for name in turns[0]:
        samples = [sample for i in counted for sample in turns[i][name]]
        ratios = []
        if baseline in turns[0]:
            ratios = [statistics.median(turns[i][baseline]) / statistics.median(turns[i][name]) for i in counted]
        timings[name] = Timing(samples, ratios=ratios, left_out=len(turns) - len(counted), others=others)
    return timings
