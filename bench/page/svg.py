"""Pieces of the report's page: shapes in percent of a picture's size, plots, and rows with a picture.

Positions are in percent so that text keeps its size on a phone. Colours are classes of the page's style sheet, which
knows light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

# Pixels: the narrowest a plot is drawn, which decides where labels have room, and its height in the style sheet.
NARROW, HEIGHT = 330, 260


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to percent of a picture's width, or of its height from the bottom."""

    low: float
    high: float
    logarithmic: bool = True

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%"/>'


def bar(kind: str, left: float, width: float, top: int) -> str:
    """A bar that is at least wide enough to be seen, as far from the bottom as from the top."""
    height = 100 - 2 * top
    return f'<rect class="{kind}" x="{left:.2f}%" y="{top}%" width="{max(width, 0.4):.2f}%" height="{height}%"/>'


def text(x: float, y: float, words: str, *, dx: float = 0, dy: float = 0, anchor: str = "start", kind: str = "") -> str:
    place = f'x="{x:.2f}%" y="{y:.2f}%" dx="{dx:g}" dy="{dy:g}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{escape(words)}</text>'


def anchor_at(percent: float) -> str:
    """The anchor that keeps a label within the picture."""
    return "start" if percent < 8 else "end" if percent > 92 else "middle"


def quiet(words: str) -> str:
    """A paragraph in small print."""
    return f'<p class="quiet">{words}</p>'


def row(name: str, picture: str, value: str, kind: str = "row") -> str:
    """A name, a picture and a value side by side."""
    return f'<div class="{kind}"><span class="name">{name}</span>{picture}<span class="value">{value}</span></div>'


def section(keys: Sequence[str], lead: str, plots: Sequence[str]) -> str:
    """A legend, a paragraph in small print, and plots."""
    return f'<p>{"".join(keys)}</p>{quiet(lead)}<div class="plots">{"".join(plots)}</div>'


def key(shape: str, kind: str, words: str) -> str:
    """An entry of a legend: a "bar", a "line" or a "dot" of a class, and what it stands for."""
    sign = {"bar": 'rect x="0" y="1" width="22" height="10"', "line": 'line x1="0" y1="6" x2="22" y2="6"'}
    sign["dot"] = 'circle cx="11" cy="6" r="4.5"'
    drawn = f'<svg style="width:22px;height:12px" aria-hidden="true"><{sign[shape]} class="{kind}"/></svg>'
    return f'<span class="key">{drawn}{escape(words)}</span>'


@dataclass
class Plot:
    """A plot over two axes; points are in their values."""

    x: Axis
    y: Axis
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in percent from the left and from the top."""
        return self.x(x), 100 - self.y(y)

    def line(self, kind: str, *points: tuple[float, float]) -> None:
        """A line through points, each piece an element of its own, because paths know no percent."""
        placed = [self.at(*point) for point in points]
        self.parts += [line(kind, *before, *after) for before, after in zip(placed, placed[1:])]

    def dot(self, kind: str, x: float, y: float, title: str, radius: float = 4.5) -> None:
        cx, cy = self.at(x, y)
        place = f'cx="{cx:.2f}%" cy="{cy:.2f}%" r="{radius:g}"'
        self.parts.append(f'<circle class="{kind}" {place}><title>{escape(title)}</title></circle>')

    def text(self, x: float, y: float, words: str, **options) -> None:
        self.parts.append(text(*self.at(x, y), words, **options))

    def ticks_x(self, ticks: Sequence[float], unit: str) -> None:
        """Lines up the plot with their values below, and the unit of the axis."""
        for tick in ticks:
            self.line("grid", (tick, self.y.high), (tick, self.y.low))
            self.text(tick, self.y.low, f"{tick:g}", dy=16, anchor=anchor_at(self.x(tick)))
        self.text(self.x.high, self.y.low, unit, dy=33, anchor="end")

    def tick_y(self, tick: float, words: str, kind: str = "grid", *, right: bool = False) -> None:
        """A line across the plot with its value above it."""
        self.line(kind, (self.x.low, tick), (self.x.high, tick))
        if right:
            self.text(self.x.high, tick, words, dy=-3, anchor="end")
        else:
            self.text(self.x.low, tick, words, dx=2, dy=-3)

    def numbered(self, points: Mapping[str, tuple[float, float]]) -> None:
        """Writes a number beside each point where it meets no point and no other number."""
        taken = [self._pixels(*point) for point in points.values()]
        for number, (x, y) in points.items():
            left, top = self._pixels(x, y)
            dx, dy = _free(left, top, taken)
            taken.append((left + dx, top + dy))
            # A text is placed by its foot.
            self.text(x, y, number, dx=dx, dy=dy + 4, anchor="middle", kind="mark")

    def _pixels(self, x: float, y: float) -> tuple[float, float]:
        """A point in pixels of the narrowest plot."""
        left, top = self.at(x, y)
        return left * NARROW / 100, top * HEIGHT / 100

    def html(self, title: str, note: str, below: str = "", label: str = "") -> str:
        """The plot with its heading, and HTML below it; texts are drawn last, so that no line runs through them."""
        drawn = "".join(sorted(self.parts, key=lambda part: part.startswith("<text")))
        picture = f'<svg role="img" aria-label="{escape(label or title)}">{drawn}</svg>'
        return f'<div><h3>{escape(title)}</h3>{quiet(escape(note))}<div class="plot">{picture}</div>{below}</div>'


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The nearest place beside a point where a number meets nothing else, all in pixels."""
    steps = [(dx, dy) for dx in (0, 15, -15, 30, -30) for dy in (15, -15, 0, 30, -30, 45, -45) if dx or dy]
    for dx, dy in sorted(steps, key=lambda step: math.hypot(*step)):
        inside = 8 < x + dx < NARROW - 8 and 8 < y + dy < HEIGHT - 8
        if inside and not any(abs(x + dx - left) < 13 and abs(y + dy - down) < 13 for left, down in taken):
            return dx, dy
    return 0, 15
