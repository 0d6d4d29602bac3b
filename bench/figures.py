"""Reads the records under bench/results, and writes their figures as text."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import measure, records
from .cases import all_cases
from .registry import OURS

NOT_YET = "not measured yet"

# The document that was kept of each case, by device and case.
Records = Mapping[str, Mapping[str, dict]]


def records_by_device(results: Path = records.RESULTS) -> Records:
    """What was measured by device, a CPU first, and by case, in the order of the registry.

    Raises:
        BadRecord: a file in the folder of a device is not a document of this benchmark.
    """
    devices: dict[str, dict[str, dict]] = {}
    for path in sorted(results.glob("*/**/*.json")):
        document, cases = records.read(path), devices.setdefault(path.relative_to(results).parts[0], {})
        for name in dict.fromkeys(row["name"] for row in document["cases"]):
            cases[name] = document | {"cases": [row for row in document["cases"] if row["name"] == name]}
    # A case that the registry no longer has comes last.
    places = {name: place for place, name in enumerate(all_cases())}
    return {
        device: dict(sorted(devices[device].items(), key=lambda item: (places.get(item[0], len(places)), item[0])))
        for device in sorted(devices, key=lambda device: (device != "cpu", device))
    }


def rows_of(found: Records, device: str, case: str) -> list[dict]:
    """The rows of a case; empty if there is no record of it."""
    return found.get(device, {}).get(case, {"cases": []})["cases"]


def row_of(found: Records, device: str, case: str, provider: str) -> dict | None:
    """The row of a provider; None if there is no record of it."""
    return next((row for row in rows_of(found, device, case) if row["provider"] == provider), None)


def gpus(found: Records) -> list[str]:
    return [device for device in found if device != "cpu"]


def device_title(device: str) -> str:
    return "CPU" if device == "cpu" else device


def is_measured(row: Mapping | None) -> bool:
    return row is not None and row["median_ms"] is not None and row["ok"] is not False


def shown(row: Mapping) -> bool:
    """Whether a row has a result to show; a provider that cannot run on the device has none."""
    return row["median_ms"] is not None or row["ok"] is False


def is_baseline(row: Mapping) -> bool:
    return row["provider"] == row.get("baseline", "reference")


def is_ours(provider: str) -> bool:
    """Whether a provider is mg_fast's own; the others are the original's steps and opponents."""
    return provider.split(",")[0] in OURS


def figure(row: Mapping | None) -> str:
    """Time, memory and ratio; for a wrong result FAIL with its reason instead of these."""
    if row is None:
        return NOT_YET
    if row["ok"] is False:
        return f"FAIL: {cell(row['why'] or 'no reason kept')}"
    if row["median_ms"] is None:
        return cell(row["why"] or NOT_YET)
    told, notes = time_and_peak(row["median_ms"], row["peak_mib"]), []
    if row.get("speedup") and not is_baseline(row):
        notes.append(ratio(row["speedup"]))
    if row.get("graphed_ms"):
        # Without this figure a gain at batch 1 could come from launches alone.
        compared = f", {ratio(row['speedup_graphed'])}" if notes else ""
        notes.append(f"as CUDA graphs {duration(row['graphed_ms'])}{compared}")
    notes += map(cell, remarks(row))
    return told + (f" ({'; '.join(notes)})" if notes else "")


def remarks(row: Mapping) -> list[str]:
    """The remarks that must stand beside a figure."""
    told = []
    if row["ok"] is None:
        told.append(row["why"] or "accuracy unknown")
    if (row.get("halves_differ") or 0) > measure.STEADY:
        told.append(f"unsteady: halves of the turns differ by {row['halves_differ']:.0%}")
    return told


def ratio(speedup: float) -> str:
    return f"{speedup:.1f} times" if speedup >= 1 else f"slower: {speedup:.2f} times"


def duration(ms: float) -> str:
    """A time with three digits, in seconds from one second on and in milliseconds below."""
    value, unit = (ms / 1e3, "s") if ms >= 1e3 else (ms, "ms")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def time_and_peak(ms: float, peak_mib: float | None) -> str:
    """A time, and the peak of memory if it was measured."""
    return duration(ms) + (f", {peak_mib:.0f} MiB" if peak_mib is not None else "")


def conditions(found: Records, used: list[tuple[str, str]]) -> list[str]:
    """A line for all cases, of pairs of a device and a case, that were measured under the same conditions."""
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
    """Machine, stack, date, load and command of a document, in one line."""
    on_gpu = document.get("device") == "cuda"
    where = f"{document['cpu']}, {document['threads']} threads, {document.get('memory_gib')} GiB of memory"
    if on_gpu:
        where = f"{document['gpu']}, driver {document.get('driver')}, clocks {document.get('clocks')}"
    told = [where, f"torch {document['torch']}", document["date"], f"commit {document['commit']}"]
    if turns := sorted({row["samples"] for row in document["cases"] if row.get("samples")}):
        several = f"{turns[0]} to {turns[-1]}" if len(turns) > 1 else str(turns[0])
        told.append(f"{several} {'samples' if on_gpu else 'turns'}")
    if left_out := max((row.get("left_out") or 0 for row in document["cases"]), default=0):
        told.append(f"{left_out} disturbed one{'s' * (left_out > 1)} left out")
    told.append(busy(document))
    if document.get("load") is not None:
        told.append(f"load {document['load']}")
    if document.get("command"):
        told.append(f"`{document['command']}`")
    return ", ".join(filter(None, told)) + "."


def cell(text: str) -> str:
    """Text as it may stand in a table of Markdown."""
    return text.replace("|", "/").replace("\n", " ")


def wrapped(text: str) -> str:
    """A paragraph or an item of a list in lines of Markdown, also within a block of quoted lines."""
    indent = "> " * text.startswith("> ") + "  " * text.removeprefix("> ").startswith("- ")
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def gpu_note(found: Records) -> str:
    return "" if gpus(found) else f" On a GPU: {NOT_YET}."
