"""What was measured, as it is kept under bench/results, and how a figure of it is told."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from . import measure, records
from .cases import all_cases

NOT_YET = "not measured yet"

# device -> case -> the document that was kept of it
Kept = Mapping[str, Mapping[str, dict]]


def kept(results: Path = records.RESULTS) -> Kept:
    """What was measured, by device: the folders of bench/results.

    Raises:
        BadRecord: a file there is no document of this benchmark.
    """
    devices = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for path in sorted(folder.rglob("*.json")):
            document = records.read(path)
            for name in dict.fromkeys(row["name"] for row in document["cases"]):
                rows = [row for row in document["cases"] if row["name"] == name]
                devices.setdefault(folder.name, {})[name] = document | {"cases": rows}
    order = list(all_cases())
    in_order = {
        device: dict(sorted(cases.items(), key=lambda item: _place(order, item[0])))
        for device, cases in devices.items()
    }
    # a CPU first
    return dict(sorted(in_order.items(), key=lambda item: (item[0] != "cpu", item[0])))


def _place(order: list[str], name: str) -> tuple[int, str]:
    """As the registry lists them; what it no longer has comes last."""
    return (order.index(name) if name in order else len(order), name)


def row_of(found: Kept, device: str, case: str, provider: str) -> dict | None:
    """A provider's row; None where nothing is kept of it."""
    rows = found.get(device, {}).get(case, {"cases": []})["cases"]
    return next((row for row in rows if row["provider"] == provider), None)


def gpus(found: Kept) -> list[str]:
    return [device for device in found if device != "cpu"]


def is_measured(row: Mapping | None) -> bool:
    return row is not None and row["median_ms"] is not None and row["ok"] is not False


def shown(row: Mapping) -> bool:
    """Whether it has something to say: what cannot run on a device has not."""
    return row["median_ms"] is not None or row["ok"] is False


def figure(row: Mapping | None) -> str:
    """Time, memory and ratio; FAIL with its reason instead of any of them."""
    if row is None:
        return NOT_YET
    if row["ok"] is False:
        return f"FAIL: {cell(row['why'] or 'no reason kept')}"
    if row["median_ms"] is None:
        return cell(row["why"] or NOT_YET)
    parts = [duration(row["median_ms"])]
    if row["peak_mib"] is not None:
        parts.append(f"{row['peak_mib']:.0f} MiB")
    notes = (
        [ratio(row["speedup"])] if row["provider"] != row.get("baseline", "reference") and row.get("speedup") else []
    )
    if row.get("graphed_ms"):
        # without it a gain at batch 1 may be launches only
        notes.append(
            f"as CUDA graphs {duration(row['graphed_ms'])}" + (f", {ratio(row['speedup_graphed'])}" if notes else "")
        )
    notes += [cell(remark) for remark in remarks(row)]
    return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")


def remarks(row: Mapping) -> list[str]:
    """What a figure must not be read without."""
    told = []
    if row["ok"] is None:
        told.append(row["why"] or "accuracy unknown")
    if (row.get("halves_differ") or 0) > measure.STEADY:
        told.append(f"unsteady: halves of the turns differ by {row['halves_differ']:.0%}")
    return told


def ratio(speedup: float) -> str:
    """2.1 times; of what takes longer, how much slower."""
    return f"{speedup:.1f} times" if speedup >= 1 else f"slower: {speedup:.2f} times"


def duration(ms: float) -> str:
    """Three digits, in seconds from one on."""
    value, unit = (ms / 1e3, "s") if ms >= 1e3 else (ms, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def conditions(found: Kept, used: list[tuple[str, str]]) -> list[str]:
    """A line for what was measured under the same conditions."""
    lines: dict[str, list[str]] = {}
    for device, case in used:
        if document := found.get(device, {}).get(case):
            lines.setdefault(condition(document), []).append(case)
    return ["", *(wrapped(f"- `{'`, `'.join(cases)}`: {line}") for line, cases in lines.items())] if lines else []


def busy(document: Mapping) -> str | None:
    """A sentence where other processes took part in every turn."""
    share = max((row.get("others") or 0 for row in document["cases"]), default=0)
    return f"BUSY: other processes took {share:.0%} of the machine in every turn" if share > measure.BUSY else None


def condition(document: Mapping) -> str:
    """Machine, stack, date, load and the command of a document, in one line."""
    if document.get("device") == "cuda":
        where = f"{document['gpu']}, driver {document.get('driver')}, clocks {document.get('clocks')}"
    else:
        where = f"{document['cpu']}, {document['threads']} threads, {document.get('memory_gib')} GiB of memory"
    turns = sorted({row["samples"] for row in document["cases"] if row.get("samples")})
    told = [where, f"torch {document['torch']}", document["date"], f"commit {document['commit']}"]
    if turns:
        several = f" to {turns[-1]}" if len(turns) > 1 else ""
        told.append(f"{turns[0]}{several} {'samples' if document.get('device') == 'cuda' else 'turns'}")
    if left_out := max((row.get("left_out") or 0 for row in document["cases"]), default=0):
        told.append(f"{left_out} disturbed ones left out")
    if disturbed := busy(document):
        told.append(disturbed)
    told += [f"load {document['load']}" if document.get("load") is not None else None]
    told += [f"`{document['command']}`" if document.get("command") else None]
    return ", ".join(part for part in told if part) + "."


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def wrapped(text: str) -> str:
    """A paragraph or an item of a list in lines of Markdown."""
    indent = "  " * text.startswith("- ")
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def gpu_note(found: Kept) -> str:
    return "" if gpus(found) else f" On a GPU: {NOT_YET}."
