"""One self-contained page of pictures from what was measured, and from shapes where nothing was.

Pictures are inline SVG in percent of their width, so that text keeps its size on a phone; colours are classes of the
style sheet, which knows light and dark.
"""

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from . import roofline
from .costs import peaks
from .costs.answer import ModelledAnswer
from .costs.gpus import GPUS
from .costs.mining import Sizes
from .figures import NOT_YET, Kept, busy, condition, duration, gpus, is_measured, remarks, shown
from .registry import Ceilings

TEMPLATE = Path(__file__).with_suffix(".html")
# what rooflines and waterfalls are drawn for where nothing was measured
MODELS = ("7b", "7b-hd")
WATERFALL_GPU = "h200"
# cases of a whole stage or more; the others are single kernels and stress shapes
STAGE_GROUPS = ("patch_mining", "tower", "clip", "dual_resize", "projector", "picture", "end-to-end")
# the last stage before the answer begins, as the meter calls it
FIRST_TOKEN = "prefill to first token"
# sizes of cards, 1e9 bytes
CARDS_GB = (16, 24, 40, 80, 141)
# pixels: the narrowest a plot is drawn, by which labels are kept apart, and its height in the style sheet
NARROW, HEIGHT = 330, 260


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


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale to percent of a picture's width, or from the bottom of its height."""

    low: float
    high: float
    logarithmic: bool = True

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def up(self, value: float) -> float:
        """From the top, as SVG counts."""
        return 100 - self(value)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%"/>'


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    """Straight pieces, each a line of its own: paths know no percent."""
    return "".join(_line(kind, *before, *after) for before, after in zip(points, points[1:]))


def _text(x: float, y: float, text: str, *, dx: float = 0, dy: float = 0, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.2f}%" y="{y:.2f}%" dx="{dx:g}" dy="{dy:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(kind: str, x: float, y: float, title: str, radius: float = 4.5) -> str:
    return f'<circle class="{kind}" cx="{x:.2f}%" cy="{y:.2f}%" r="{radius:g}"><title>{escape(title)}</title></circle>'


def _anchor(percent: float) -> str:
    """Labels stay within the picture."""
    return "start" if percent < 8 else "end" if percent > 92 else "middle"


def _key(sign: str, text: str) -> str:
    return f'<span class="key"><svg style="width:22px;height:12px" aria-hidden="true">{sign}</svg>{escape(text)}</span>'


def _bar_key(kind: str, text: str) -> str:
    return _key(f'<rect class="{kind}" x="0" y="1" width="22" height="10"/>', text)


def _line_key(kind: str, text: str) -> str:
    return _key(f'<line class="{kind}" x1="0" y1="6" x2="22" y2="6"/>', text)


def _dot_key(kind: str, text: str) -> str:
    return _key(f'<circle class="{kind}" cx="11" cy="6" r="4.5"/>', text)


def _device(device: str) -> str:
    return "CPU" if device == "cpu" else device


def _conditions(found: Kept) -> str:
    """A line for everything that was measured under the same conditions."""
    lines = [
        f"<b>{escape(_device(device))}</b>: {escape(line)}"
        for device, cases in found.items()
        for line in _settings(cases.values())
    ]
    if not gpus(found):
        lines.append(f"<b>GPU</b>: {NOT_YET}; <code>python -m bench gpu --out DIR</code> measures one.")
    if "cpu" not in found:
        lines.insert(0, f"<b>CPU</b>: {NOT_YET}; <code>python -m bench run --device cpu --save</code> measures it.")
    return "".join(f'<p class="quiet">{line}</p>' for line in lines)


def _settings(documents: Iterable[Mapping]) -> list[str]:
    """Their conditions, each once; commands, turns and loads that differ are told with the cases they belong to."""
    common = ("command", "load", "cases")
    return list(
        dict.fromkeys(
            condition({k: v for k, v in document.items() if k not in common} | {"cases": []}) for document in documents
        )
    )


# ---- speedups


def _speedups(found: Kept) -> str:
    if not any(shown(row) for cases in found.values() for document in cases.values() for row in document["cases"]):
        return f'<p class="empty">Speedups are {NOT_YET}: <code>python -m bench run --save</code> keeps what it measures.</p>'
    keys = (
        _bar_key("b-ours", "mg_fast")
        + _bar_key("b-plain", "other forms")
        + _bar_key("b-slower", "slower than the original's steps")
    )
    parts = [
        f"<p>{keys}</p>",
        '<p class="quiet">Logarithmic; the thin line is from the 20th to the 80th percentile of the turns\' ratios.</p>',
    ]
    for device, cases in found.items():
        parts.append(f"<h3>{escape(_device(device))}</h3>")
        compared = [
            row for document in cases.values() for row in document["cases"] if is_measured(row) and row["speedup"]
        ]
        ratios = [
            row.get(key) or row["speedup"] for row in compared for key in ("speedup", "speedup_p20", "speedup_p80")
        ]
        axis = (
            Axis(min(0.5, *(0.9 * r for r in ratios)), max(2.0, *(1.1 * r for r in ratios))) if ratios else Axis(0.5, 2)
        )
        for group in dict.fromkeys(name.split("/")[0] for name in cases):
            drawn = [_case(name, document, axis) for name, document in cases.items() if name.split("/")[0] == group]
            # single kernels and stress shapes are many, and not what is asked for first
            opened = " open" if group in STAGE_GROUPS else ""
            parts.append(f"<details{opened}><summary>{escape(group)}</summary>{''.join(drawn)}</details>")
    return "\n".join(parts)


def _case(name: str, document: Mapping, axis: Axis) -> str:
    rows, absent = (
        [row for row in document["cases"] if shown(row)],
        [row for row in document["cases"] if not shown(row)],
    )
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axis.low <= t <= axis.high]
    grid = "".join(_line("one" if tick == 1 else "grid", axis(tick), 0, axis(tick), 100) for tick in ticks)
    labels = "".join(_text(axis(tick), 100, f"{tick:g}x", dy=-4, anchor=_anchor(axis(tick))) for tick in ticks)
    lines = [f"<h4>{escape(name)}</h4>"]
    if disturbed := busy(document):
        lines.append(f'<p class="quiet">{escape(disturbed)}: neither times nor ratios hold for a quiet one.</p>')
    if rows:
        lines.append(
            f'<div class="row axis"><span class="name"></span><svg aria-hidden="true">{labels}</svg><span class="value"></span></div>'
        )
    lines += [_bar(row, axis, grid) for row in rows]
    told = [condition(document), *(f"{row['provider']}: {row['why'] or NOT_YET}" for row in absent)]
    summary = "conditions" + (f", and {len(absent)} that did not run" if absent else "")
    lines.append(
        f'<details class="quiet"><summary>{summary}</summary><p>{"</p><p>".join(map(escape, told))}</p></details>'
    )
    return "\n".join(lines)


# providers that are this project's; the rest are opponents
def _ours(provider: str) -> bool:
    return provider.split(",")[0] in ("torch", "auto", "triton", "packed", "23 layers")


def _bar(row: Mapping, axis: Axis, grid: str) -> str:
    name = f'<span class="name">{escape(row["provider"])}</span>'
    if row["ok"] is False:
        why = escape(row["why"] or "no reason kept")
        return f'<div class="row">{name}<span class="long"><span class="fail">FAIL</span> {why}</span></div>'
    base = row["provider"] == row.get("baseline", "reference")
    told = [duration(row["median_ms"])] + ([f"{row['peak_mib']:.0f} MiB"] if row["peak_mib"] is not None else [])
    speedup = 1.0 if base else row["speedup"]
    if not speedup:
        return f'<div class="row">{name}<svg aria-hidden="true">{grid}</svg><span class="value">{escape(", ".join(told))}</span></div>'
    kind = "b-slower" if speedup < 0.995 else "b-ours" if _ours(row["provider"]) else "b-plain"
    left, right = sorted((axis(1), axis(speedup)))
    bar = f'<rect class="{kind}" x="{left:.2f}%" y="20%" width="{max(right - left, 0.4):.2f}%" height="60%"/>'
    if row.get("speedup_p20") and not base:
        bar += _line("spread", axis(row["speedup_p20"]), 50, axis(row["speedup_p80"]), 50)
    text = (
        ""
        if base
        else f"<b>{speedup:.2f}x</b> "
        if speedup >= 0.995
        else f'<b class="slower">{speedup:.2f}x slower</b> '
    )
    notes = remarks(row)
    remark = f'<br><span class="quiet">{escape("; ".join(notes))}</span>' if notes else ""
    title = f"<title>{escape(row['provider'])}: {speedup:.2f}x, {escape(', '.join(told))}</title>"
    return (
        f'<div class="row">{name}<svg role="img">{title}{grid}{bar}</svg>'
        f'<span class="value">{text}<span class="quiet">{escape(", ".join(told))}</span>{remark}</span></div>'
    )


# ---- rooflines


@dataclass(frozen=True)
class Point:
    """A computation by FLOP per byte and TFLOP/s."""

    name: str
    intensity: float
    tflops: float
    ours: bool = True
    measured: bool = True


def _rooflines(found: Kept) -> str:
    keys = [_line_key("l-plain", "ceilings")]
    keys += [_dot_key("b-ours", "measured, mg_fast"), _dot_key("b-plain", "measured, the original's steps")]
    keys += [_dot_key("open l-ours", "predicted, not measured: the floor of a stage of 7B at 768 pixels, bfloat16")]
    plots, drawn = [], set()
    for device, cases in found.items():
        document = next((d for d in cases.values() if roofline.recorded_ceilings(d)), None)
        if document is None:
            continue
        ceilings = roofline.recorded_ceilings(document)
        drawn.add(device)
        # one dtype and one picture, or there would be more points than a reader can tell apart
        ending = "-b1-float32" if device == "cpu" else "-b1-bfloat16"
        points = [
            p
            for name, case in cases.items()
            if name.endswith(ending) and name.split("/")[0] in STAGE_GROUPS
            for p in _points(case["cases"])
        ]
        plots.append(_roofline(_device(device), ceilings, "ceilings measured with the cases", points))
    for gpu in GPUS.values():
        if gpu.name.lower().replace(" ", "-") in drawn:
            continue
        source = (
            "data sheet"
            if gpu.reached is None
            else "memory and bfloat16 as one card reached them, float32 by the data sheet"
        )
        plots.append(_roofline(gpu.name, gpu.ceilings, source, _predicted(gpu.ceilings)))
    lead = "FLOP per byte moved, and TFLOP/s; both logarithmic. Under the slope memory is what holds back, under the roof the products."
    return f'<p>{"".join(keys)}</p><p class="quiet">{lead}</p><div class="plots">{"".join(plots)}</div>'


def _points(rows: Sequence[Mapping]) -> list[Point]:
    """The original's steps and the fastest right form of a case."""
    counted = [row for row in rows if is_measured(row) and row["ok"] and row.get("tflops") and row.get("gbps")]
    chosen = [row for row in counted if row["provider"] == row.get("baseline", "reference")]
    others = [row for row in counted if row not in chosen]
    chosen += [min(others, key=lambda row: row["median_ms"])] if others else []
    return [
        Point(
            f"{row['name']} {row['provider']}", 1e3 * row["tflops"] / row["gbps"], row["tflops"], _ours(row["provider"])
        )
        for row in chosen
    ]


def _predicted(ceilings: Ceilings) -> list[Point]:
    answer = ModelledAnswer(MODELS[0])
    return [
        Point(
            stage.name, stage.intensity, stage.cost.flop / stage.floor_ms(ceilings, answer.dtype) / 1e9, measured=False
        )
        for stage in [*answer.stages, answer.decode]
        if stage.cost.flop
    ]


def _roofline(title: str, ceilings: Ceilings, source: str, points: Sequence[Point]) -> str:
    # both halves are as fast, and one line of them is enough
    rates = {
        dtype: rate
        for dtype, rate in ceilings.matmul_tflops.items()
        if dtype != "float16" or "bfloat16" not in ceilings.matmul_tflops
    }
    top = max([*rates.values(), *(p.tflops for p in points)])
    x = Axis(min([0.5, *(p.intensity / 1.5 for p in points)]), max([50000.0, *(1.5 * p.intensity for p in points)]))
    y = Axis(min([ceilings.copy_gbps * x.low / 1e3, *(p.tflops / 1.5 for p in points)]), 2.5 * top)
    body = []
    for tick in (10.0**k for k in range(-4, 5)):
        if x.low <= tick <= x.high:
            body += [
                _line("grid", x(tick), 0, x(tick), 100),
                _text(x(tick), 100, f"{tick:g}", dy=16, anchor=_anchor(x(tick))),
            ]
        if y.low <= tick <= y.high:
            body += [
                _line("grid", 0, y.up(tick), 100, y.up(tick)),
                _text(100, y.up(tick), f"{tick:g} TFLOP/s", dy=-3, anchor="end"),
            ]
    body.append(_text(100, 100, "FLOP per byte", dy=33, anchor="end"))
    slope_end = min(x.high, 1e3 * max(rates.values()) / ceilings.copy_gbps)
    body.append(
        _path(
            "l-plain",
            [
                (x(x.low), y.up(ceilings.copy_gbps * x.low / 1e3)),
                (x(slope_end), y.up(ceilings.copy_gbps * slope_end / 1e3)),
            ],
        )
    )
    for dtype, rate in rates.items():
        start = min(1e3 * rate / ceilings.copy_gbps, x.high)
        # told at the left, where no point can be
        body += [
            _line("fit", 0, y.up(rate), x(start), y.up(rate)),
            _line("l-plain", x(start), y.up(rate), 100, y.up(rate)),
        ]
        body.append(_text(0, y.up(rate), f"{dtype} {_rate(rate)}", dy=-4))
    numbers = {point: str(i) for i, point in enumerate(points, 1)}
    # what a number must keep clear of, in pixels of the narrowest plot
    taken = [(x(p.intensity) * NARROW / 100, y.up(p.tflops) * HEIGHT / 100) for p in points]
    for point in points:
        px, py = x(point.intensity), y.up(point.tflops)
        kind = ("b-ours" if point.ours else "b-plain") if point.measured else "open l-ours"
        body.append(_dot(kind, px, py, f"{point.name}: {point.intensity:.3g} FLOP/byte, {point.tflops:.3g} TFLOP/s"))
        at = px * NARROW / 100, py * HEIGHT / 100
        dx, dy = _free(*at, taken)
        taken.append((at[0] + dx, at[1] + dy))
        # a text is placed by its foot
        body.append(_text(px, py, numbers[point], dx=dx, dy=dy + 4, anchor="middle", kind="mark"))
    listed = "".join(f"<li>{numbers[p]} {escape(p.name)}{'' if p.measured else ' (predicted)'}</li>" for p in points)
    where = f"{ceilings.copy_gbps / 1e3:.3g} TB/s" if ceilings.copy_gbps >= 1e3 else f"{ceilings.copy_gbps:.3g} GB/s"
    return (
        f'<div><h3>{escape(title)}</h3><p class="quiet">{where}; {escape(source)}</p><div class="plot">'
        f'<svg role="img" aria-label="roofline of {escape(title)}">{_drawn(body)}</svg></div><ol class="legend">{listed}</ol></div>'
    )


def _rate(tflops: float) -> str:
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where beside a point its number meets nothing else, as near as there is room."""
    steps = [(dx, dy) for dx in (0, 15, -15, 30, -30) for dy in (15, -15, 0, 30, -30, 45, -45) if dx or dy]
    for dx, dy in sorted(steps, key=lambda step: math.hypot(*step)):
        inside = 8 < x + dx < NARROW - 8 and 8 < y + dy < HEIGHT - 8
        if inside and not any(abs(x + dx - left) < 13 and abs(y + dy - down) < 13 for left, down in taken):
            return dx, dy
    return 0, 15


def _drawn(parts: Sequence[str]) -> str:
    """Texts over everything else, so that no line runs through them."""
    return "".join(sorted(parts, key=lambda part: part.startswith("<text")))


# ---- memory


def _memory(found: Kept) -> str:
    keys = _line_key("l-plain", "the original's steps, by formula") + _line_key(
        "l-ours", "mg_fast by its kernel, by formula"
    )
    dots = _dot_key("b-plain", "measured, the original's steps") + _dot_key("b-ours", "measured, mg_fast")
    weights, packed = ModelledAnswer(MODELS[0]).weight_bytes, peaks.packed_bytes(torch.bfloat16)
    plots = []
    for batch in (1, 8):
        title = f"A 7B model in bfloat16 with {'one picture' if batch == 1 else f'{batch} pictures at once'}"
        sizes = {side: Sizes.of_picture(side, torch.bfloat16, batch) for side in peaks.SIDES}
        series = {
            "l-plain": [(side, (weights + peaks.reference_picture_peak(of)) / 1e9) for side, of in sizes.items()],
            "l-ours": [(side, (weights + packed + peaks.kernel_picture_peak(of)) / 1e9) for side, of in sizes.items()],
        }
        note = "weights, packed copies, and the peak on the pictures' way to tokens; no KV cache"
        plots.append(_size_plot(title, note, series, [], Axis(0, 1, False), _fits(series)))
    for device, dtype in [("cpu", torch.float32), *((device, torch.bfloat16) for device in gpus(found))]:
        points = _peaks(found, device, str(dtype).removeprefix("torch."))
        series = {
            kind: [(side, peak(Sizes.of_picture(side, dtype)) / 1e9) for side in peaks.SIDES]
            for kind, peak in (("l-plain", peaks.reference_peak), ("l-ours", peaks.kernel_peak))
        }
        title = f"Mining alone, {_device(device)}, {str(dtype).removeprefix('torch.')}: above inputs and weights"
        note = (
            "points were measured" + ", mg_fast's of its PyTorch form" * (device == "cpu")
            if points
            else f"{NOT_YET}: lines are the formula"
        )
        plots.append(_size_plot(title, note, series, points, Axis(0.01, 60), ""))
    lead = (
        "Side of the picture in pixels. Up to 768 one view; beyond it cells of at most 768 pixels and the global view, as in HD. "
        "Where a line crosses that of a card, it no longer fits there; "
        "what the driver and libraries take for themselves comes on top."
    )
    return f'<p>{keys}{dots}</p><p class="quiet">{lead}</p><div class="plots">{"".join(plots)}</div>'


def _fits(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Which cards hold both to what size."""
    told = []
    for card in CARDS_GB:
        sides = {
            kind: max((side for side, value in points if value <= card), default=None)
            for kind, points in series.items()
        }
        plain, ours = sides["l-plain"], sides["l-ours"]
        if ours is None:
            told.append(f"{card} GB: neither")
        elif plain != ours:
            told.append(
                f"{card} GB: mg_fast to {ours}, the original's steps {f'to {plain}' if plain else 'not at all'}"
            )
    return "; ".join(told) + (" pixels. Larger cards hold both at every size drawn." if told else "")


def _peaks(found: Kept, device: str, dtype: str) -> list[tuple[int, float, str, str]]:
    """Side, GB, kind of dot and title of what was measured of mining."""
    points = []
    for side, setting in ((768, "768"), (1536, "1536-hd")):
        for row in found.get(device, {}).get(f"patch_mining/{setting}-b1-{dtype}", {"cases": []})["cases"]:
            if is_measured(row) and row["peak_mib"] and row["provider"] in ("reference", "torch", "triton"):
                kind = "b-plain" if row["provider"] == "reference" else "b-ours"
                points.append(
                    (
                        side,
                        row["peak_mib"] * 2**20 / 1e9,
                        kind,
                        f"{row['name']} {row['provider']}: {row['peak_mib']:.0f} MiB",
                    )
                )
    return points


def _size_plot(
    title: str,
    note: str,
    series: Mapping[str, Sequence[tuple[int, float]]],
    points: Sequence[tuple[int, float, str, str]],
    y: Axis,
    told: str,
) -> str:
    x = Axis(300, 3100, logarithmic=False)
    body = []
    if y.logarithmic:
        ticks = [(tick, f"{1e3 * tick:g} MB" if tick < 1 else f"{tick:g} GB", "grid") for tick in (0.01, 0.1, 1, 10)]
    else:
        top = max(value for line in series.values() for _, value in line)
        # those it reaches, and the next
        cards = CARDS_GB[: sum(card < top for card in CARDS_GB) + 1]
        y = Axis(0, 1.12 * max([top, *cards]), logarithmic=False)
        ticks = [(0, "0", "grid"), *((card, f"{card} GB card", "fit") for card in cards)]
    for tick, label, kind in ticks:
        body += [_line(kind, 0, y.up(tick), 100, y.up(tick)), _text(0, y.up(tick), label, dx=2, dy=-3)]
    for side in (384, 768, 1536, 2304, 3072):
        body += [
            _line("grid", x(side), 0, x(side), 100),
            _text(x(side), 100, str(side), dy=16, anchor=_anchor(x(side))),
        ]
    body.append(_text(100, 100, "pixels along a side", dy=33, anchor="end"))
    for kind, line in series.items():
        body.append(_path(kind, [(x(side), y.up(value)) for side, value in line]))
        body += [
            _dot(f"open {kind}", x(side), y.up(value), f"{side} pixels: {value:.3g} GB, by formula", 3)
            for side, value in line
        ]
    body += [_dot(kind, x(side), y.up(value), tip, 5.5) for side, value, kind, tip in points]
    label = f'<p class="quiet">{escape(told)}</p>' if told else ""
    return (
        f'<div><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p><div class="plot">'
        f'<svg role="img" aria-label="{escape(title)}">{_drawn(body)}</svg></div>{label}</div>'
    )


# ---- waterfalls


def _waterfalls(found: Kept) -> str:
    measured = []
    for device, cases in found.items():
        for name, document in cases.items():
            if document["cases"][0]["name"].split("/")[0] not in ("picture", "end-to-end"):
                continue
            with_stages = [row for row in document["cases"] if row.get("stages") and row["ok"] is not False]
            longest = max(
                (sum(stage["ms"] for stage in _to_first_token(row["stages"])) for row in with_stages), default=0
            )
            for row in with_stages:
                stages = [
                    (stage["name"], stage["ms"], stage.get("peak_mib")) for stage in _to_first_token(row["stages"])
                ]
                kind = "b-plain" if row["provider"] == row.get("baseline", "reference") else "b-ours"
                measured.append(
                    _waterfall(f"{name} {row['provider']}, {_device(device)}", "measured", kind, stages, longest)
                )
    gpu = GPUS[WATERFALL_GPU]
    predicted = []
    for model in MODELS:
        answer = ModelledAnswer(model)
        stages = [(stage.name, stage.floor_ms(gpu.ceilings, answer.dtype), None) for stage in answer.stages]
        title = f"{model} in bfloat16, {answer.prompt_tokens} tokens of prompt, {gpu.name}"
        predicted.append(
            _waterfall(title, "floor from shapes, not measured", "b-third", stages, sum(ms for _, ms, _ in stages))
        )
    lead = (
        "" if measured else f'<p class="empty">Stages are {NOT_YET}; below are floors, which no program goes under.</p>'
    )
    note = (
        '<p class="quiet">Stages that follow one another, from left to right; what was measured together shares its scale. '
        "Cases of the group picture end with the image tokens, before the language model.</p>"
    )
    return note + lead + "".join(measured) + "".join(predicted)


def _to_first_token(stages: Sequence[Mapping]) -> Sequence[Mapping]:
    """Without what comes after it."""
    names = [stage["name"] for stage in stages]
    return stages[: names.index(FIRST_TOKEN) + 1] if FIRST_TOKEN in names else stages


def _waterfall(
    title: str, tag: str, kind: str, stages: Sequence[tuple[str, float, float | None]], longest: float
) -> str:
    longest = longest or 1.0
    lines, begun = [f'<h4>{escape(title)} <span class="tag">{escape(tag)}</span></h4>'], 0.0
    grid = "".join(_line("grid", at, 0, at, 100) for at in (0, 25, 50, 75, 100))
    for name, ms, peak in stages:
        bar = f'<rect class="{kind}" x="{100 * begun / longest:.2f}%" y="15%" width="{max(100 * ms / longest, 0.4):.2f}%" height="70%"/>'
        told = duration(ms) + (f", {peak:.0f} MiB" if peak is not None else "")
        begun += ms
        picture = f'<svg role="img"><title>{escape(name)}: {escape(told)}</title>{grid}{bar}</svg>'
        lines.append(
            f'<div class="row"><span class="name">{escape(name)}</span>{picture}<span class="value">{escape(told)}</span></div>'
        )
    lines.append(
        f'<div class="row"><span class="name"><b>together</b></span><span></span><span class="value"><b>{duration(begun)}</b></span></div>'
    )
    return "\n".join(lines)
