"""The report's page: one self-contained file of pictures, from what was measured, and from shapes where nothing was."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from . import svg
from .costs import peak_memory
from .costs.answer import ModelledAnswer
from .costs.gpus import GPUS
from .costs.mining import Sizes
from .figures import NOT_YET, Kept, busy, condition, device_title, duration, gpus, is_measured, remarks, rows_of, shown
from .registry import OURS, Ceilings
from .roofline import recorded_ceilings
from .svg import Axis, Plot, key, quiet

TEMPLATE = Path(__file__).with_suffix(".html")
# The models whose floors are drawn, and the GPU.
MODELS = ("7b", "7b-hd")
WATERFALL_GPU = GPUS["h200"]
# Groups of cases of a whole stage or more; the other groups are single kernels and stress shapes.
STAGE_GROUPS = ("patch_mining", "tower", "clip", "dual_resize", "projector", "picture", "end-to-end")
# The last stage before the answer begins, under the meter's name.
FIRST_TOKEN = "prefill to first token"
# Memory of cards in 1e9 bytes.
CARDS_GB = (16, 24, 40, 80, 141)


def page(found: Kept) -> str:
    """The page's HTML."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        conditions=_conditions(found),
        speedups=_speedups(found),
        rooflines=_rooflines(found),
        memory=_memory(found),
        waterfalls=_waterfalls(found),
    )


def _is_baseline(row: Mapping) -> bool:
    return row["provider"] == row.get("baseline", "reference")


def _is_ours(provider: str) -> bool:
    """Whether a provider is mg_fast's own; the others are the original's steps and opponents."""
    return provider.split(",")[0] in OURS


def _group(name: str) -> str:
    return name.split("/")[0]


def _conditions(found: Kept) -> str:
    """A line for everything that was measured under the same conditions."""
    lines = []
    if "cpu" not in found:
        lines.append(f"<b>CPU</b>: {NOT_YET}; <code>python -m bench run --device cpu --save</code> measures it.")
    # Commands, turns and loads differ from case to case, so they are shown with each case.
    told = ("command", "load", "cases")
    for device, cases in found.items():
        common = ({k: v for k, v in document.items() if k not in told} | {"cases": []} for document in cases.values())
        lines += [
            f"<b>{escape(device_title(device))}</b>: {escape(line)}" for line in dict.fromkeys(map(condition, common))
        ]
    if not gpus(found):
        lines.append(f"<b>GPU</b>: {NOT_YET}; <code>python -m bench gpu --out DIR</code> measures one.")
    return "".join(map(quiet, lines))


def _section(keys: Sequence[str], lead: str, plots: Sequence[str]) -> str:
    return f'<p>{"".join(keys)}</p>{quiet(lead)}<div class="plots">{"".join(plots)}</div>'


# ---- speedups


def _speedups(found: Kept) -> str:
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
        for group in dict.fromkeys(map(_group, cases)):
            drawn = [_case(name, document, axis) for name, document in cases.items() if _group(name) == group]
            # Single kernels and stress shapes are many, and few readers ask for them first.
            opened = " open" if group in STAGE_GROUPS else ""
            parts.append(f"<details{opened}><summary>{escape(group)}</summary>{''.join(drawn)}</details>")
    return "\n".join(parts)


def _case(name: str, document: Mapping, axis: Axis) -> str:
    """The bars of a case, and its conditions."""
    absent = [row for row in document["cases"] if not shown(row)]
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axis.low <= t <= axis.high]
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
    base = _is_baseline(measured)
    told = duration(measured["median_ms"])
    if measured["peak_mib"] is not None:
        told += f", {measured['peak_mib']:.0f} MiB"
    speedup = 1.0 if base else measured["speedup"]
    if not speedup:
        return svg.row(name, f'<svg aria-hidden="true">{grid}</svg>', told)
    slower = speedup < 0.995
    kind = "b-slower" if slower else "b-ours" if _is_ours(measured["provider"]) else "b-plain"
    left, right = sorted((axis(1), axis(speedup)))
    bar = svg.bar(kind, left, right - left, 20)
    if measured.get("speedup_p20") and not base:
        bar += svg.line("spread", axis(measured["speedup_p20"]), 50, axis(measured["speedup_p80"]), 50)
    ratio = f'<b class="slower">{speedup:.2f}x slower</b> ' if slower else f"<b>{speedup:.2f}x</b> "
    value = f'{"" if base else ratio}<span class="quiet">{told}</span>'
    if notes := remarks(measured):
        value += f'<br><span class="quiet">{escape("; ".join(notes))}</span>'
    return svg.row(name, f'<svg role="img"><title>{name}: {speedup:.2f}x, {told}</title>{grid}{bar}</svg>', value)


# ---- rooflines


@dataclass(frozen=True)
class Point:
    """A computation by FLOP per byte and TFLOP/s."""

    name: str
    intensity: float
    tflops: float
    kind: str


def _rooflines(found: Kept) -> str:
    keys = [key("line", "l-plain", "ceilings")]
    keys += [key("dot", "b-ours", "measured, mg_fast"), key("dot", "b-plain", "measured, the original's steps")]
    floor = "predicted, not measured: the floor of a stage of 7B at 768 pixels, bfloat16"
    keys += [key("dot", "open l-ours", floor)]
    plots, drawn = [], set()
    for device, cases in found.items():
        ceilings = next(filter(None, map(recorded_ceilings, cases.values())), None)
        if ceilings is None:
            continue
        drawn.add(device)
        # Only one dtype and one picture: with all of them there would be more points than a reader can tell apart.
        ending = "-b1-float32" if device == "cpu" else "-b1-bfloat16"
        chosen = [name for name in cases if name.endswith(ending) and _group(name) in STAGE_GROUPS]
        points = [point for name in chosen for point in _points(cases[name]["cases"])]
        plots.append(_roofline(device_title(device), ceilings, "ceilings measured with the cases", points))
    for gpu in GPUS.values():
        if gpu.name.lower().replace(" ", "-") not in drawn:
            reached = "memory and bfloat16 as one card reached them, float32 by the data sheet"
            source = "data sheet" if gpu.reached is None else reached
            plots.append(_roofline(gpu.name, gpu.ceilings, source, _predicted(gpu.ceilings)))
    lead = "FLOP per byte moved, and TFLOP/s, both on logarithmic scales. "
    lead += "Under the slope memory limits the speed, under the roof the matrix products do."
    return _section(keys, lead, plots)


def _points(rows: Sequence[Mapping]) -> list[Point]:
    """The original's steps and the fastest right form of a case."""
    counted = [row for row in rows if is_measured(row) and row["ok"] and row.get("tflops") and row.get("gbps")]
    chosen = [row for row in counted if _is_baseline(row)]
    chosen += sorted((row for row in counted if not _is_baseline(row)), key=lambda row: row["median_ms"])[:1]
    return [
        Point(
            f"{row['name']} {row['provider']}",
            1e3 * row["tflops"] / row["gbps"],
            row["tflops"],
            "b-ours" if _is_ours(row["provider"]) else "b-plain",
        )
        for row in chosen
    ]


def _predicted(ceilings: Ceilings) -> list[Point]:
    """The floors of the stages of an answer."""
    answer = ModelledAnswer(MODELS[0])
    stages = [stage for stage in [*answer.stages, answer.decode] if stage.cost.flop]
    rates = [stage.cost.flop / stage.floor_ms(ceilings, answer.dtype) / 1e9 for stage in stages]
    return [Point(stage.name, stage.intensity, rate, "open l-ours") for stage, rate in zip(stages, rates)]


def _roofline(title: str, ceilings: Ceilings, source: str, points: Sequence[Point]) -> str:
    rates = dict(ceilings.matmul_tflops)
    if "bfloat16" in rates:
        # float16 is as fast, and one line for both is enough.
        rates.pop("float16", None)
    slope = ceilings.copy_gbps / 1e3
    x = Axis(min([0.5, *(p.intensity / 1.5 for p in points)]), max([50000.0, *(1.5 * p.intensity for p in points)]))
    top = max([*rates.values(), *(p.tflops for p in points)])
    plot = Plot(x, Axis(min([slope * x.low, *(p.tflops / 1.5 for p in points)]), 2.5 * top))
    ticks = [10.0**k for k in range(-4, 5)]
    plot.ticks_x([tick for tick in ticks if x.low <= tick <= x.high], "FLOP per byte")
    for tick in ticks:
        if plot.y.low <= tick <= plot.y.high:
            plot.tick_y(tick, f"{tick:g} TFLOP/s", right=True)
    end = min(x.high, max(rates.values()) / slope)
    plot.line("l-plain", (x.low, slope * x.low), (end, slope * end))
    for dtype, rate in rates.items():
        start = min(rate / slope, x.high)
        plot.line("fit", (x.low, rate), (start, rate))
        plot.line("l-plain", (start, rate), (x.high, rate))
        # The name stands at the left, where no point can be.
        plot.text(x.low, rate, f"{dtype} {rate:.0f}" if rate >= 100 else f"{dtype} {rate:.3g}", dy=-4)
    for p in points:
        tip = f"{p.name}: {p.intensity:.3g} FLOP/byte, {p.tflops:.3g} TFLOP/s"
        plot.dot(p.kind, p.intensity, p.tflops, tip)
    plot.numbered({str(i): (p.intensity, p.tflops) for i, p in enumerate(points, 1)})
    listed = "".join(
        f"<li>{i} {escape(p.name)}{' (predicted)' * p.kind.startswith('open')}</li>" for i, p in enumerate(points, 1)
    )
    where = f"{slope:.3g} TB/s" if slope >= 1 else f"{ceilings.copy_gbps:.3g} GB/s"
    return plot.html(title, f"{where}; {source}", f'<ol class="legend">{listed}</ol>', f"roofline of {title}")


# ---- memory

# The values of a line of a plot, by the side of the picture in pixels.
Curve = Mapping[int, float]


def _memory(found: Kept) -> str:
    keys = [key("line", "l-plain", "the original's steps, by formula")]
    keys += [key("line", "l-ours", "mg_fast by its kernel, by formula")]
    keys += [key("dot", "b-plain", "measured, the original's steps"), key("dot", "b-ours", "measured, mg_fast")]
    weights, packed = ModelledAnswer(MODELS[0]).weight_bytes, peak_memory.packed_bytes(torch.bfloat16)
    plots = []
    for batch in (1, 8):
        sizes = {side: Sizes.of_picture(side, torch.bfloat16, batch) for side in peak_memory.SIDES}
        plain = {side: (weights + peak_memory.reference_picture_peak(of)) / 1e9 for side, of in sizes.items()}
        ours = {side: (weights + packed + peak_memory.kernel_picture_peak(of)) / 1e9 for side, of in sizes.items()}
        title = f"A 7B model in bfloat16 with {'one picture' if batch == 1 else f'{batch} pictures at once'}"
        note = "weights, packed copies, and the peak until all image tokens are made; without a KV cache"
        # The cards whose memory the curves exceed, and the next larger one.
        top = max(*plain.values(), *ours.values())
        cards = CARDS_GB[: sum(card < top for card in CARDS_GB) + 1]
        plot = Plot(SIDE, Axis(0, 1.12 * max(top, *cards), logarithmic=False))
        plot.tick_y(0, "0")
        for card in cards:
            plot.tick_y(card, f"{card} GB card", "fit")
        _draw_curves(plot, plain, ours)
        fits = _fits(plain, ours)
        plots.append(plot.html(title, note, quiet(escape(fits)) if fits else ""))
    for device, dtype in [("cpu", torch.float32), *((device, torch.bfloat16) for device in gpus(found))]:
        sizes = {side: Sizes.of_picture(side, dtype) for side in peak_memory.SIDES}
        plot, name = Plot(SIDE, Axis(0.01, 60)), str(dtype).removeprefix("torch.")
        for tick in (0.01, 0.1, 1, 10):
            plot.tick_y(tick, f"{1e3 * tick:g} MB" if tick < 1 else f"{tick:g} GB")
        plain = {side: peak_memory.reference_peak(of) / 1e9 for side, of in sizes.items()}
        _draw_curves(plot, plain, {side: peak_memory.kernel_peak(of) / 1e9 for side, of in sizes.items()})
        note = f"{NOT_YET}: the lines are the formula"
        if _draw_peaks(plot, found, device, name):
            note = "points were measured" + "; those of mg_fast with its PyTorch form" * (device == "cpu")
        plots.append(plot.html(f"Mining alone, {device_title(device)}, {name}: above inputs and weights", note))
    lead = (
        "The horizontal axis is the side of the picture in pixels. Up to 768 there is one view; beyond it there are "
        "cells of at most 768 pixels and the global view, as in HD. Where a curve crosses the line of a card, it no "
        "longer fits there; the driver and the libraries need memory of their own on top."
    )
    return _section(keys, lead, plots)


SIDE = Axis(300, 3100, logarithmic=False)


def _draw_curves(plot: Plot, plain: Curve, ours: Curve) -> None:
    plot.ticks_x((384, 768, 1536, 2304, 3072), "pixels along a side")
    for kind, curve in (("l-plain", plain), ("l-ours", ours)):
        plot.line(kind, *curve.items())
        for side, value in curve.items():
            plot.dot(f"open {kind}", side, value, f"{side} pixels: {value:.3g} GB, by formula", 3)


def _draw_peaks(plot: Plot, found: Kept, device: str, dtype: str) -> bool:
    """Draws the peaks of mining that were measured; returns whether there were any."""
    measured = False
    for side, setting in ((768, "768"), (1536, "1536-hd")):
        for row in rows_of(found, device, f"patch_mining/{setting}-b1-{dtype}"):
            if is_measured(row) and row["peak_mib"] and row["provider"] in ("reference", "torch", "triton"):
                kind = "b-plain" if row["provider"] == "reference" else "b-ours"
                title = f"{row['name']} {row['provider']}: {row['peak_mib']:.0f} MiB"
                plot.dot(kind, side, row["peak_mib"] * 2**20 / 1e9, title, 5.5)
                measured = True
    return measured


def _fits(plain: Curve, ours: Curve) -> str:
    """Up to which size each card holds either form."""
    told = []
    for card in CARDS_GB:
        largest, largest_ours = (
            max((side for side, value in curve.items() if value <= card), default=None) for curve in (plain, ours)
        )
        if largest_ours is None:
            told.append(f"{card} GB: neither")
        elif largest != largest_ours:
            original = f"to {largest}" if largest else "not at all"
            told.append(f"{card} GB: mg_fast to {largest_ours}, the original's steps {original}")
    return "; ".join(told) + (" pixels. Larger cards hold both at every size drawn." if told else "")


# ---- waterfalls


def _waterfalls(found: Kept) -> str:
    parts = []
    for device, cases in found.items():
        for name, document in cases.items():
            if _group(name) in ("picture", "end-to-end"):
                rows = [row for row in document["cases"] if row.get("stages") and row["ok"] is not False]
                stages = {row["provider"]: _to_first_token(row["stages"]) for row in rows}
                longest = max((sum(ms for _, ms, _ in each) for each in stages.values()), default=0)
                for row in rows:
                    title = f"{name} {row['provider']}, {device_title(device)}"
                    kind = "b-plain" if _is_baseline(row) else "b-ours"
                    parts.append(_waterfall(title, "measured", kind, stages[row["provider"]], longest))
    if not parts:
        floors = "below are floors, which no program goes under."
        parts.append(f'<p class="empty">Stages are {NOT_YET}; {floors}</p>')
    for model in MODELS:
        answer = ModelledAnswer(model)
        stages = [(stage.name, stage.floor_ms(WATERFALL_GPU.ceilings, answer.dtype), None) for stage in answer.stages]
        title = f"{model} in bfloat16, {answer.prompt_tokens} tokens of prompt, {WATERFALL_GPU.name}"
        longest = sum(ms for _, ms, _ in stages)
        parts.append(_waterfall(title, "floor from shapes, not measured", "b-third", stages, longest))
    note = "Stages follow one another from left to right. Bars that were measured together share a scale. "
    note += "Cases of the group picture end with the image tokens, before the language model."
    return quiet(note) + "".join(parts)


# A stage's name, milliseconds, and peak in MiB where it is known.
Step = tuple[str, float, float | None]


def _to_first_token(stages: Sequence[Mapping]) -> list[Step]:
    """The stages up to the first token."""
    names = [stage["name"] for stage in stages]
    end = names.index(FIRST_TOKEN) + 1 if FIRST_TOKEN in names else len(names)
    return [(stage["name"], stage["ms"], stage.get("peak_mib")) for stage in stages[:end]]


def _waterfall(title: str, tag: str, kind: str, stages: Sequence[Step], longest: float) -> str:
    longest = longest or 1.0
    lines, begun = [f'<h4>{escape(title)} <span class="tag">{escape(tag)}</span></h4>'], 0.0
    grid = "".join(svg.line("grid", at, 0, at, 100) for at in (0, 25, 50, 75, 100))
    for name, ms, peak in stages:
        bar = svg.bar(kind, 100 * begun / longest, 100 * ms / longest, 15)
        told = duration(ms) + (f", {peak:.0f} MiB" if peak is not None else "")
        begun += ms
        picture = f'<svg role="img"><title>{escape(name)}: {told}</title>{grid}{bar}</svg>'
        lines.append(svg.row(escape(name), picture, told))
    lines.append(svg.row("<b>together</b>", "<span></span>", f"<b>{duration(begun)}</b>"))
    return "\n".join(lines)
