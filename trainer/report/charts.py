"""Stand-alone SVG figures: lines with bands or whiskers, one panel beside the other.

The same numbers give the same file. They follow the reader's light or dark scheme.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 118, 30, 42
LABEL_HEIGHT = 14
LABEL_WIDTH = 100
# Okabe and Ito's colours, which stay apart for the colour-blind, and four more for thin lines.
COLORS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b949e"),
    *("#9467bd", "#8c564b", "#bcbd22", "#17becf"),
)
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3d444d }
.title { font-weight: 600; font-size: 13px }
.grid { stroke: #8b949e; stroke-opacity: .25 }
.at { stroke: #8b949e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } }
"""


class Mark(NamedTuple):
    """A point with its interval; `low` and `high` equal to `y` draw none."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line, or one point, of a panel."""

    label: str
    marks: Sequence[Mark]
    color: int = 0
    """Index into COLORS."""
    thin: bool = False
    """Drawn thin: not what the figure is about."""
    joined: bool = True
    """A line with a band; else points with whiskers."""


@dataclass(frozen=True)
class Panel:
    """Axes and what is drawn in them."""

    title: str
    x: str
    """Of the horizontal axis."""
    series: Sequence[Series]
    log_x: bool = False
    zero: bool = False
    """Start the vertical axis at 0."""
    lines: Sequence[float] = field(default=())
    """Vertical reference lines."""


def figure(panels: Sequence[Panel], source: str) -> str:
    """An SVG of `panels` side by side; `source` names the data's file, in its description.

    Raises ValueError for a panel without any finite point.
    """
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}">',
        f"<desc>{escape(source)}</desc><style>{STYLE}</style>",
    ]
    for place, panel in enumerate(panels):
        parts += [f'<g transform="translate({place * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    axes = _Axes(panel)
    yield f'<text class="title" x="{LEFT}" y="16">{escape(panel.title)}</text>'
    yield from _grid(axes, panel)
    for series in sorted(panel.series, key=lambda s: not s.thin):
        yield from _series(axes, series)
    yield from _labels(axes, panel)


class _Axes:
    """From data to the picture."""

    def __init__(self, panel: Panel):
        marks = [mark for series in panel.series for mark in series.marks]
        middles = [mark.y for mark in marks if math.isfinite(mark.y)]
        if not middles:
            raise ValueError(f"nothing to draw in {panel.title!r}: no point is finite")
        # Intervals of few seeds are wide; the points are what is to be seen.
        room = (max(middles) - min(middles)) / 3 or 0.5
        low, high = min(middles) - room, max(middles) + room
        ends = [v for mark in marks for v in (mark.low, mark.high) if math.isfinite(v)]
        values = [*middles, *(min(max(v, low), high) for v in ends)]
        self.log = panel.log_x
        xs = [self._scaled(x) for x in (*(mark.x for mark in marks), *panel.lines)]
        pad = 0.05 * (max(xs) - min(xs)) if self.log else 0.0
        self.x0, self.x1 = min(xs) - pad, max(xs) + pad
        self.y_ticks = ticks(min(0.0, *values) if panel.zero else min(values), max(values))
        self.y0, self.y1 = self.y_ticks[0], self.y_ticks[-1]

    def _scaled(self, x: float) -> float:
        return math.log10(x) if self.log else x

    def x(self, value: float) -> float:
        share = (self._scaled(value) - self.x0) / ((self.x1 - self.x0) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = min(max(value, self.y0), self.y1)  # an interval may leave the picture
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def x_ticks(self) -> list[float]:
        if not self.log:
            return [tick for tick in ticks(self.x0, self.x1, 5) if self.x0 <= tick <= self.x1]
        powers = range(math.floor(self.x0), math.ceil(self.x1) + 1)
        fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        inside = [tick for tick in fine if self.x0 <= math.log10(tick) <= self.x1]
        if len(inside) > 6:
            inside = [tick for tick in inside if math.log10(tick) % 2 == 0]
        return inside


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose the range."""
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _grid(axes: _Axes, panel: Panel) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in axes.y_ticks:
        y = axes.y(tick)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in axes.x_ticks():
        x = axes.x(tick)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
    for place in panel.lines:
        x = axes.x(place)
        yield f'<path class="at" d="M{x:.1f} {TOP}V{bottom}"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(panel.x)}</text>'


def _series(axes: _Axes, series: Series) -> Iterator[str]:
    color, width = COLORS[series.color % len(COLORS)], 1 if series.thin else 2.2
    marks = [mark for mark in series.marks if math.isfinite(mark.y)]
    points = [(axes.x(mark.x), axes.y(mark.y)) for mark in marks]
    if series.joined and len(points) > 1:
        if not series.thin and any(mark.high > mark.low for mark in marks):
            upper = [f"{axes.x(mark.x):.1f} {axes.y(mark.high):.1f}" for mark in marks]
            lower = [f"{axes.x(mark.x):.1f} {axes.y(mark.low):.1f}" for mark in marks[::-1]]
            yield f'<path d="M{"L".join(upper + lower)}Z" fill="{color}" fill-opacity=".15"/>'
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'
        return
    for (x, y), mark in zip(points, marks, strict=True):
        low, high = axes.y(mark.low), axes.y(mark.high)
        yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.4"/>'
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>'


def _labels(axes: _Axes, panel: Panel) -> Iterator[str]:
    """Names at the right ends of lines and beside points, moved where they would overlap."""
    ends = []
    for series in panel.series:
        last = next((m for m in reversed(series.marks) if math.isfinite(m.y)), None)
        if last is not None:
            ends.append((axes.y(last.y), axes.x(last.x), series))
    ends.sort(key=lambda end: end[0])
    joined = any(series.joined for *_, series in ends)
    ys = spread([y for y, *_ in ends]) if joined else _beside([(x, y) for y, x, _ in ends])
    for y, (_, x, series) in zip(ys, ends, strict=True):
        color, text = COLORS[series.color % len(COLORS)], escape(series.label)
        x = WIDTH - RIGHT if series.joined else x
        yield f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" style="fill:{color}">{text}</text>'


def _beside(points: Sequence[tuple[float, float]]) -> list[float]:
    """The y of each point's label, below those before it that it would cover."""
    placed: list[tuple[float, float]] = []
    for x, y in points:
        for other_x, other_y in placed:
            if abs(x - other_x) < LABEL_WIDTH and abs(y - other_y) < LABEL_HEIGHT:
                y = other_y + LABEL_HEIGHT
        placed.append((x, y))
    return [y for _, y in placed]


def spread(ys: Sequence[float], lowest: float = HEIGHT - BOTTOM) -> list[float]:
    """Rising `ys`, moved until each has LABEL_HEIGHT, above `lowest`."""
    moved: list[float] = []
    for y in ys:
        moved.append(max(y, moved[-1] + LABEL_HEIGHT) if moved else y)
    below = float(lowest)
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], below)
        below = moved[place] - LABEL_HEIGHT
    return moved
