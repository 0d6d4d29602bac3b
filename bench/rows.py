"""The row of one provider of one case in a document, and the table of a case's rows."""

import statistics
from collections.abc import Sequence

from .measure import BUSY, STEADY, Timing, halves_differ, quantile
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


# Title, width and key of the columns of a table after the provider's name.
COLUMNS = (
    ("median ms", 10, "median_ms"),
    ("p20..p80", 18, "spread"),
    ("speedup", 9, "speedup"),
    ("warm", 9, "warm_ms"),
    ("graph", 9, "graphed_ms"),
    ("first", 9, "first_call_ms"),
    ("MiB", 8, "peak_mib"),
    ("GB/s", 7, "gbps"),
    ("TFLOP/s", 9, "tflops"),
    ("floor", 7, "of_floor"),
    ("error", 9, "relative_error"),
)


def format_rows(rows: Sequence[dict]) -> str:
    """A table of one case."""
    lines = [f"  {'provider':<26}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS)]
    for row in rows:
        if row["median_ms"] is None:
            lines.append(f"  {row['provider']:<26}{'FAIL' if row['ok'] is False else '-':>10}  {row['why']}")
            continue
        lines.append(f"  {row['provider']:<26}" + "".join(f"{_cell(row, key):>{width}}" for _, width, key in COLUMNS))
        if row["why"]:
            lines.append(f"    {row['why']}")
    unsteady = [
        f"{row['provider']} {row['halves_differ']:.0%}" for row in rows if (row.get("halves_differ") or 0) > STEADY
    ]
    if unsteady:
        lines.append(
            "  UNSTEADY: the first and second half of the turns differ in the ratio to "
            f"{rows[0]['baseline']}: {', '.join(unsteady)}"
        )
    busy = max((row.get("others") or 0 for row in rows), default=0)
    if busy > BUSY:
        lines.append(
            f"  BUSY: other processes took {busy:.0%} of the machine in every turn: "
            "neither times nor ratios hold for a quiet one"
        )
    return "\n".join(lines)


def _cell(row: dict, key: str) -> str:
    value = row.get(key)
    if key == "spread":
        return f"{_short(row['p20_ms'])}..{_short(row['p80_ms'])}"
    if value is None or (key == "speedup" and not row["ok"]):
        return "-"
    formats = {"speedup": "{:.2f}x", "of_floor": "{:.0%}", "relative_error": "{:.0e}"}
    return formats[key].format(value) if key in formats else _short(value)


def _short(value: float) -> str:
    """Three digits of a small number; a large one without decimals."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
