"""What a run on a GPU found, in one page of Markdown, which also holds how its steps ended for a later run to go on
from.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import records
from ..errors import BadRecord
from . import plan as plans

# kernels of a table that are shown
MOST_KERNELS = 25
_KEPT = re.compile(r"<!-- steps\n(.*?)\n-->", re.DOTALL)


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        state: `done`; `done, with failures` (of opponents, each a row that says so); `failed` (it crashed, or one of
            our own providers or a test failed); `stopped` (by its limit); `interrupted`; `skipped` (no time was left)
            or `running`.
        status: the exit status of its last process.
        earlier: it ended so in an earlier run, and was not run again.
    """

    name: str
    command: str
    limit_s: float
    state: str = "running"
    status: int | None = None
    seconds: float = 0.0
    earlier: bool = False

    def told(self) -> str:
        """The state in words."""
        words = {
            "failed": f"failed, exit status {self.status}",
            "stopped": "stopped by its limit",
            "skipped": "skipped, no time was left",
        }
        return (
            f"{words.get(self.state, self.state)} ({self.seconds:.0f} s{', in an earlier run' if self.earlier else ''})"
        )


def conclude(out: Path, outcomes: Sequence[Outcome], earlier: Sequence[Outcome] = ()) -> None:
    """Writes the summary anew. Steps of an earlier run that this one has not come to yet stay as they were."""
    names = {outcome.name for outcome in outcomes}
    every = [*(outcome for outcome in earlier if outcome.name not in names), *outcomes]
    (out / plans.SUMMARY).write_text(summarise(out, every), encoding="utf-8")


def earlier_outcomes(folder: Path) -> list[Outcome]:
    """How the steps of an earlier run ended, as its summary holds it.

    Raises:
        BadRecord: the folder has no such summary.
    """
    path = folder / plans.SUMMARY
    try:
        found = _KEPT.search(path.read_text(encoding="utf-8"))
        return [Outcome(**kept) for kept in json.loads(found[1])]
    except OSError as error:
        raise BadRecord(
            f"{path} cannot be read: {error.strerror}: expected the folder of an earlier `bench gpu`"
        ) from None
    except (TypeError, ValueError):
        raise BadRecord(f"{path} does not hold the steps of an earlier `bench gpu`") from None


def summarise(out: Path, outcomes: Sequence[Outcome]) -> str:
    """The page."""
    files = (plans.ENVIRONMENT, plans.CASES, plans.END_TO_END)
    documents = {name: records.read(out / name) for name in files if (out / name).exists()}
    lines = ["# One run on a GPU", ""]
    if documents:
        where = next(iter(documents.values()))
        keys = ("date", "gpu", "driver", "clocks", "cpu", "torch", "triton", "transformers", "commit")
        lines += [f"- {key}: {where[key]}" for key in keys if where.get(key) is not None]
        ceilings = where["ceilings"]
        products = ", ".join(f"{dtype} {tflops:.4g}" for dtype, tflops in ceilings["matmul_tflops"].items())
        lines += [f"- a copy reaches {ceilings['copy_gbps']:.4g} GB/s; matrix products reach, in TFLOP/s: {products}"]
        if load := where.get("clocks_under_load"):
            lowest, median, highest = load["sm_mhz"]
            lines.append(
                f"- under load the multiprocessors run at {lowest:.0f} to {highest:.0f} MHz (median {median:.0f}), "
                f"at up to {load['power_w']:.0f} W and {load['temperature_c']:.0f} degrees Celsius"
            )
        lines.append("")
    lines += [
        "| step | outcome |",
        "|---|---|",
        *(f"| {outcome.name} | {outcome.told()} |" for outcome in outcomes),
        "",
    ]
    if tests := _text(out / plans.CORRECTNESS).strip().splitlines():
        lines += ["## Kernels", "", "```", *tests[-20:], "```", ""]
    for title, name in (("Cases", plans.CASES), ("End to end", plans.END_TO_END)):
        if name in documents and documents[name]["cases"]:
            rows = documents[name]["cases"]
            lines += [f"## {title}", "", *_table(rows), ""]
            for row in rows:
                if row.get("kernels"):
                    lines += [f"### Kernels of {row['name']}, {row['provider']}", "", *_kernels(row["kernels"]), ""]
    if tuning := _text(out / plans.TUNING).strip():
        lines += ["## Tuning", "", "```python", tuning[-20000:], "```", ""]
    return "\n".join([*lines, "<!-- steps", json.dumps([asdict(outcome) for outcome in outcomes]), "-->", ""])


COLUMNS = (
    ("median ms", "median_ms"),
    ("p20", "p20_ms"),
    ("p80", "p80_ms"),
    ("p99", "p99_ms"),
    ("warm", "warm_ms"),
    ("graph", "graphed_ms"),
    ("speedup, graphs", "speedup_graphed"),
    ("first call", "first_call_ms"),
    ("peak MiB", "peak_mib"),
    ("GB/s", "gbps"),
    ("TFLOP/s", "tflops"),
    ("of floor", "of_floor"),
    ("tokens/s", "tokens_per_s"),
    ("MHz", "mhz"),
)


def _table(rows: Sequence[dict]) -> list[str]:
    """Rows of cases, what was not measured left out."""
    rows = [row | {"mhz": row["clocks"]["sm_mhz"][1] if row.get("clocks") else None} for row in rows]
    columns = [(title, key) for title, key in COLUMNS if any(row.get(key) is not None for row in rows)]
    titles = ["case", "provider", "speedup", *(title for title, _ in columns), "same bits"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    order = list(dict.fromkeys(row["name"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["name"])):
        speedup = "FAIL" if row["ok"] is False else f"{row['speedup']:.2f}" if row.get("speedup") else "-"
        values = (f"{row[key]:.4g}" if row.get(key) is not None else "" for _, key in columns)
        same = {True: "yes", False: "NO", None: ""}[row.get("equal_bits")]
        lines.append("| " + " | ".join([row["name"], row["provider"], speedup, *values, same]) + " |")
    why = [f"- {row['name']}, {row['provider']}: {row['why']}" for row in rows if row["why"]]
    return [*lines, *([""] if why else []), *why]


def _kernels(table: dict) -> list[str]:
    wall, busy = table["wall_us"], table["busy_us"]
    takes = "" if wall is None else f" takes {wall:.0f} us on the device, and"
    lines = [f"One call{takes} has {table['launches']:.0f} launches, which take {busy:.0f} us together.", ""]
    lines += ["| kernel | launches | us | share |", "|---|---|---|---|"]
    for row in table["kernels"][:MOST_KERNELS]:
        lines.append(
            f"| {row['name'].replace('|', '/')} | {row['launches']:.0f} | {row['us']:.1f} | {row['us'] / max(busy, 1e-9):.1%} |"
        )
    return lines


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
