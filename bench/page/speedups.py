"""The page's bars: the speedup of every provider of every case that was measured."""

from collections.abc import Mapping
from html import escape

from ..figures import (
    NOT_YET,
    Records,
    busy,
    condition,
    device_title,
    is_baseline,
    is_measured,
    is_ours,
    remarks,
    shown,
    time_and_peak,
)
from ..registry import STAGE_GROUPS, group_of
from . import svg
from .svg import Axis, key, quiet

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def speedups(found: Records) -> str:
    """The bars of all cases, by device and group."""
    if not any(shown(row) for cases in found.values() for document in cases.values() for row in document["cases"]):
        how = "<code>python -m bench run --save</code> keeps what it measures."
        return f'<p class="empty">Speedups are {NOT_YET}: {how}</p>'
    keys = key("bar", "b-ours", "mg_fast") + key("bar", "b-plain", "other forms")
    keys += key("bar", "b-slower", "slower than the original's steps")
    spread = "The thin line reaches from the 20th to the 80th percentile of the ratios within the turns."
    parts = [f"<p>{keys}</p>", quiet(f"The scale is logarithmic. {spread}")]
    for device, cases in found.items():
        parts.append(f"<h3>{escape(device_title(device))}</h3>")
        rows = [row for document in cases.values() for row in document["cases"] if is_measured(row) and row["speedup"]]
        ratios = [row.get(name) or row["speedup"] for row in rows for name in ("speedup", "speedup_p20", "speedup_p80")]
        axis = Axis(min([0.5, *(0.9 * r for r in ratios)]), max([2.0, *(1.1 * r for r in ratios)]))
        for group in dict.fromkeys(map(group_of, cases)):
            drawn = [_case(name, document, axis) for name, document in cases.items() if group_of(name) == group]
            # Single kernels and stress shapes are many, and few readers ask for them first.
            opened = " open" if group in STAGE_GROUPS else ""
            parts.append(f"<details{opened}><summary>{escape(group)}</summary>{''.join(drawn)}</details>")
    return "\n".join(parts)


def _case(name: str, document: Mapping, axis: Axis) -> str:
    """The bars of a case, and its conditions."""
    absent = [row for row in document["cases"] if not shown(row)]
    ticks = [tick for tick in TICKS if axis.low <= tick <= axis.high]
    grid = "".join(svg.line("one" if tick == 1 else "grid", axis(tick), 0, axis(tick), 100) for tick in ticks)
    labels = "".join(svg.text(axis(tick), 100, f"{tick:g}x", dy=-4, anchor=svg.anchor_at(axis(tick))) for tick in ticks)
    lines = [f"<h4>{escape(name)}</h4>"]
    if disturbed := busy(document):
        lines.append(quiet(f"{escape(disturbed)}: neither times nor ratios hold for a quiet machine."))
    if len(absent) < len(document["cases"]):
        lines.append(svg.row("", f'<svg aria-hidden="true">{labels}</svg>', "", "row axis"))
    lines += [_bar(row, axis, grid) for row in document["cases"] if shown(row)]
    told = [condition(document), *(f"{row['provider']}: {row['why'] or NOT_YET}" for row in absent)]
    summary = "conditions" + (f", and {len(absent)} that did not run" if absent else "")
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in told)
    lines.append(f'<details class="quiet"><summary>{summary}</summary>{paragraphs}</details>')
    return "\n".join(lines)


def _bar(measured: Mapping, axis: Axis, grid: str) -> str:
    """A provider's time, memory and speedup."""
    name = escape(measured["provider"])
    if measured["ok"] is False:
        why = escape(measured["why"] or "no reason kept")
        failed = f'<span class="long"><span class="fail">FAIL</span> {why}</span>'
        return f'<div class="row"><span class="name">{name}</span>{failed}</div>'
    base = is_baseline(measured)
    told = time_and_peak(measured["median_ms"], measured["peak_mib"])
    speedup = 1.0 if base else measured["speedup"]
    if not speedup:
        return svg.row(name, f'<svg aria-hidden="true">{grid}</svg>', told)
    slower = speedup < 0.995
    kind = "b-slower" if slower else "b-ours" if is_ours(measured["provider"]) else "b-plain"
    left, right = sorted((axis(1), axis(speedup)))
    bar = svg.bar(kind, left, right - left, 20)
    if measured.get("speedup_p20") and not base:
        bar += svg.line("spread", axis(measured["speedup_p20"]), 50, axis(measured["speedup_p80"]), 50)
    ratio = f'<b class="slower">{speedup:.2f}x slower</b> ' if slower else f"<b>{speedup:.2f}x</b> "
    value = f'{"" if base else ratio}<span class="quiet">{told}</span>'
    if notes := remarks(measured):
        value += f'<br><span class="quiet">{escape("; ".join(notes))}</span>'
    return svg.row(name, f'<svg role="img"><title>{name}: {speedup:.2f}x, {told}</title>{grid}{bar}</svg>', value)
