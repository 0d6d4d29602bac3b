"""The page's rooflines: the stages that were measured on each device, and the floors of the stages on GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..costs.answer import ModelledAnswer
from ..costs.gpus import GPUS
from ..figures import Records, device_title, is_baseline, is_measured, is_ours
from ..registry import STAGE_GROUPS, Ceilings, group_of
from ..roofline import recorded_ceilings
from .svg import Axis, Plot, key, section

# The model whose stages' floors are drawn.
MODEL = "7b"
TICKS = [10.0**k for k in range(-4, 5)]


@dataclass(frozen=True)
class Point:
    """A computation by FLOP per byte and TFLOP/s."""

    name: str
    intensity: float
    tflops: float
    kind: str


def rooflines(found: Records) -> str:
    """A plot for each device that was measured, and for each other GPU that has a data sheet."""
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
        chosen = [name for name in cases if name.endswith(ending) and group_of(name) in STAGE_GROUPS]
        points = [point for name in chosen for point in _points(cases[name]["cases"])]
        plots.append(_plot(device_title(device), ceilings, "ceilings measured with the cases", points))
    for gpu in GPUS.values():
        if gpu.name.lower().replace(" ", "-") not in drawn:
            reached = "memory and bfloat16 as one card reached them, float32 by the data sheet"
            source = "data sheet" if gpu.reached is None else reached
            plots.append(_plot(gpu.name, gpu.ceilings, source, _predicted(gpu.ceilings)))
    lead = "FLOP per byte moved, and TFLOP/s, both on logarithmic scales. "
    lead += "Under the slope memory limits the speed, under the roof the matrix products do."
    return section(keys, lead, plots)


def _points(rows: Sequence[Mapping]) -> list[Point]:
    """The original's steps and the fastest right form of a case."""
    counted = [row for row in rows if is_measured(row) and row["ok"] and row.get("tflops") and row.get("gbps")]
    others = sorted((row for row in counted if not is_baseline(row)), key=lambda row: row["median_ms"])
    points = []
    for row in [*filter(is_baseline, counted), *others[:1]]:
        name, kind = f"{row['name']} {row['provider']}", "b-ours" if is_ours(row["provider"]) else "b-plain"
        points.append(Point(name, 1e3 * row["tflops"] / row["gbps"], row["tflops"], kind))
    return points


def _predicted(ceilings: Ceilings) -> list[Point]:
    """The floors of the stages of an answer."""
    answer = ModelledAnswer(MODEL)
    stages = [stage for stage in [*answer.stages, answer.decode] if stage.cost.flop]
    rates = [stage.cost.flop / stage.floor_ms(ceilings, answer.dtype) / 1e9 for stage in stages]
    return [Point(stage.name, stage.intensity, rate, "open l-ours") for stage, rate in zip(stages, rates)]


def _plot(title: str, ceilings: Ceilings, source: str, points: Sequence[Point]) -> str:
    rates = dict(ceilings.matmul_tflops)
    if "bfloat16" in rates:
        # float16 is as fast, and one line for both is enough.
        rates.pop("float16", None)
    slope = ceilings.copy_gbps / 1e3
    x = Axis(min([0.5, *(p.intensity / 1.5 for p in points)]), max([50000.0, *(1.5 * p.intensity for p in points)]))
    top = max([*rates.values(), *(p.tflops for p in points)])
    plot = Plot(x, Axis(min([slope * x.low, *(p.tflops / 1.5 for p in points)]), 2.5 * top))
    plot.ticks_x([tick for tick in TICKS if x.low <= tick <= x.high], "FLOP per byte")
    for tick in TICKS:
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
        plot.dot(p.kind, p.intensity, p.tflops, f"{p.name}: {p.intensity:.3g} FLOP/byte, {p.tflops:.3g} TFLOP/s")
    plot.numbered({str(i): (p.intensity, p.tflops) for i, p in enumerate(points, 1)})
    predicted = [" (predicted)" * p.kind.startswith("open") for p in points]
    listed = "".join(f"<li>{i} {escape(p.name)}{note}</li>" for i, (p, note) in enumerate(zip(points, predicted), 1))
    where = f"{slope:.3g} TB/s" if slope >= 1 else f"{ceilings.copy_gbps:.3g} GB/s"
    return plot.html(title, f"{where}; {source}", f'<ol class="legend">{listed}</ol>', f"roofline of {title}")
