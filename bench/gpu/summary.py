"""What a run on a GPU found, in one page of Markdown.

The page also holds how its steps ended, from which a later run goes on.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import records
from ..errors import BadRecord
from ..figures import markdown
from . import plan as plans

# The most kernels of a table that are shown.
MOST_KERNELS = 25
_STEPS = re.compile(r"<!-- steps\n(.*?)\n-->", re.DOTALL)


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
        when = ", in an earlier run" if self.earlier else ""
        return f"{words.get(self.state, self.state)} ({self.seconds:.0f} s{when})"


def conclude(out: Path, outcomes: Sequence[Outcome], earlier: Sequence[Outcome] = ()) -> None:
    """Writes the summary anew. Steps of an earlier run that this one has not reached stay as they were."""
    names = {outcome.name for outcome in outcomes}
    every = [*(outcome for outcome in earlier if outcome.name not in names), *outcomes]
    (out / plans.SUMMARY).write_text(summary(out, every), encoding="utf-8")


def earlier_outcomes(folder: Path) -> list[Outcome]:
    """How the steps of an earlier run ended; raises BadRecord for a folder whose summary does not say it."""
    path = folder / plans.SUMMARY
    try:
        found = _STEPS.search(path.read_text(encoding="utf-8"))
        return [Outcome(**fields) for fields in json.loads(found[1])]
    except OSError as error:
        expected = "expected the folder of an earlier `bench gpu`"
        raise BadRecord(f"{path} cannot be read: {error.strerror}: {expected}") from None
    except (TypeError, ValueError):
        raise BadRecord(f"{path} does not hold the steps of an earlier `bench gpu`") from None


def summary(out: Path, outcomes: Sequence[Outcome]) -> str:
    """The page."""
    files = (plans.ENVIRONMENT, plans.CASES, plans.END_TO_END)
    documents = {name: records.read(out / name) for name in files if (out / name).exists()}
    lines = ["# One run on a GPU", ""]
    if documents:
        lines += [*_conditions(next(iter(documents.values()))), ""]
    lines += [markdown(["step", "outcome"], [[outcome.name, outcome.told()] for outcome in outcomes]), ""]
    if tests := text_of(out / plans.CORRECTNESS).strip().splitlines():
        lines += ["## Kernels", "", "```", *tests[-20:], "```", ""]
    for title, name in (("Cases", plans.CASES), ("End to end", plans.END_TO_END)):
        if rows := documents.get(name, {"cases": []})["cases"]:
            lines += [f"## {title}", "", *_table(rows), ""]
            for row in rows:
                if row.get("kernels"):
                    lines += [f"### Kernels of {row['name']}, {row['provider']}", "", *_kernels(row["kernels"]), ""]
    if tuning := text_of(out / plans.TUNING).strip():
        lines += ["## Tuning", "", "```python", tuning[-20000:], "```", ""]
    return "\n".join([*lines, "<!-- steps", json.dumps([asdict(outcome) for outcome in outcomes]), "-->", ""])


def _conditions(document: dict) -> list[str]:
    keys = ("date", "gpu", "driver", "clocks", "cpu", "torch", "triton", "transformers", "commit")
    lines = [f"- {key}: {document[key]}" for key in keys if document.get(key) is not None]
    ceilings = document["ceilings"]
    products = ", ".join(f"{dtype} {tflops:.4g}" for dtype, tflops in ceilings["matmul_tflops"].items())
    lines += [f"- a copy reaches {ceilings['copy_gbps']:.4g} GB/s; matrix products reach, in TFLOP/s: {products}"]
    if load := document.get("clocks_under_load"):
        lowest, median, highest = load["sm_mhz"]
        lines.append(
            f"- under load the multiprocessors run at {lowest:.0f} to {highest:.0f} MHz (median {median:.0f}), "
            f"at up to {load['power_w']:.0f} W and {load['temperature_c']:.0f} degrees Celsius"
        )
    return lines


# The columns of a row that are shown where they were measured.
COLUMNS = ("median_ms", "p20_ms", "p80_ms", "p99_ms", "warm_ms", "graphed_ms", "speedup_graphed", "first_call_ms")
COLUMNS += ("peak_mib", "gbps", "tflops", "of_floor", "tokens_per_s", "mhz")


def _table(rows: Sequence[dict]) -> list[str]:
    """Rows of cases, without the columns of what was not measured."""
    rows = [row | {"mhz": row["clocks"]["sm_mhz"][1] if row.get("clocks") else None} for row in rows]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    titles = ["case", "provider", "speedup", *columns, "equal_bits"]
    cells = []
    order = list(dict.fromkeys(row["name"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["name"])):
        speedup = "FAIL" if row["ok"] is False else f"{row['speedup']:.2f}" if row.get("speedup") else "-"
        values = (f"{row[key]:.4g}" if row.get(key) is not None else "" for key in columns)
        same = {True: "yes", False: "NO", None: ""}[row.get("equal_bits")]
        cells.append([row["name"], row["provider"], speedup, *values, same])
    reasons = [f"- {row['name']}, {row['provider']}: {row['why']}" for row in rows if row["why"]]
    return [markdown(titles, cells), *([""] if reasons else []), *reasons]


def _kernels(table: dict) -> list[str]:
    wall, busy = table["wall_us"], table["busy_us"]
    takes = "" if wall is None else f" takes {wall:.0f} us on the device, and"
    first = f"One call{takes} has {table['launches']:.0f} launches, which take {busy:.0f} us together."
    rows = []
    for row in table["kernels"][:MOST_KERNELS]:
        name, share = row["name"].replace("|", "/"), row["us"] / max(busy, 1e-9)
        rows.append([name, f"{row['launches']:.0f}", f"{row['us']:.1f}", f"{share:.1%}"])
    return [first, "", markdown(["kernel", "launches", "us", "share"], rows)]


def text_of(path: Path) -> str:
    """The text of a file; an empty one where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
