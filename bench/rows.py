"""The row of one provider of one case in a document."""

import statistics

from .measure import Timing, halves_differ, quantile
from .peaks import out_of_memory
from .registry import Case, Ceilings

# The slowest hundredth is reported where there are at least this many samples.
TAIL = 200
UNMEASURED = ("median_ms", "p20_ms", "p80_ms", "warm_ms", "graphed_ms", "first_call_ms", "peak_mib", "relative_error")
UNMEASURED += ("speedup", "speedup_graphed", "equal_bits", "clocks")


def empty_row(case: Case, provider: str) -> dict:
    """A provider's row before anything was measured."""
    row = {"name": case.name, "provider": provider, "baseline": case.baseline, "ok": None, "why": None}
    return row | dict.fromkeys(UNMEASURED)


def why(error: BaseException) -> str:
    """An error in one line, as a row says it."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"out of memory: {text}" if out_of_memory(error) else f"{type(error).__name__}: {text}"


def fill_times(row: dict, case: Case, timing: Timing, ceilings: Ceilings, device: str) -> None:
    """Fills a provider's row with its times and the figures that follow from them."""
    row["median_ms"] = median = statistics.median(timing.samples)
    row["p20_ms"], row["p80_ms"] = quantile(timing.samples, 0.2), quantile(timing.samples, 0.8)
    row["warm_ms"], row["samples"] = timing.warm_ms, len(timing.samples)
    if timing.ratios:
        row["speedup"] = statistics.median(timing.ratios)
        row["speedup_p20"], row["speedup_p80"] = quantile(timing.ratios, 0.2), quantile(timing.ratios, 0.8)
        row["halves_differ"] = halves_differ(timing.ratios, least=2 if device == "cuda" else 4)
        row["left_out"], row["others"] = timing.left_out, timing.others
    if case.clocked and len(timing.samples) >= TAIL:
        row["p99_ms"] = quantile(timing.samples, 0.99)
    if case.tokens:
        row["tokens_per_s"] = 1e3 * case.tokens / median
    # On a CPU this project's forms take other steps than those that were counted.
    work = case.providers[row["provider"]].work
    if work and (device == "cuda" or row["provider"] == case.baseline):
        row["tflops"], row["gbps"] = work.flop / median / 1e9, work.bytes / median / 1e6
    if floor := ceilings.floor_ms(case.least, case.dtype):
        row["floor_ms"], row["of_floor"] = floor, floor / median
