"""The table of a case's rows, which `python -m bench run` prints."""

from collections.abc import Sequence

from .figures import busy
from .measure import STEADY

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
    if unsteady := [row for row in rows if (row.get("halves_differ") or 0) > STEADY]:
        told = ", ".join(f"{row['provider']} {row['halves_differ']:.0%}" for row in unsteady)
        between = f"differ in the ratio to {rows[0]['baseline']}"
        lines.append(f"  UNSTEADY: the first and second half of the turns {between}: {told}")
    if disturbed := busy({"cases": rows}):
        lines.append(f"  {disturbed}: neither times nor ratios hold for a quiet one")
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
