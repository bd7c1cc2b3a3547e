"""Line charts as SVG: a figure with its own style, or parts for the page of a run.

The same numbers give the same file. Figures follow the reader's light or dark scheme.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import median
from typing import NamedTuple

LABEL_HEIGHT, LABEL_WIDTH = 14, 100
GAP = 5
"""A line breaks where its next point is this many times as far as usual."""
MAX_DOTS = 30
"""Dots up to this number stay apart; more are drawn small."""
# Okabe and Ito's colours, which stay apart for the colour-blind, and four more for thin lines.
COLORS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b949e"),
    *("#9467bd", "#8c564b", "#bcbd22", "#17becf"),
)
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3d444d }
.title { font-weight: 600; font-size: 13px }
.grid, .base { stroke: #8b949e; stroke-opacity: .25 }
.at { stroke: #8b949e; stroke-dasharray: 4 3 }
.line { fill: none; stroke-width: 2.2 } .thin { stroke-width: 1 }
.dashed { stroke-dasharray: 5 3 } .band { fill-opacity: .15 }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } }
""" + "".join(
    f".line.k{i} {{ stroke: {c} }} .dot.k{i}, .band.k{i}, .name.k{i} {{ fill: {c} }}\n"
    for i, c in enumerate(COLORS)
)


class Frame(NamedTuple):
    """The size of a panel and its margins, in pixels."""

    width: int = 432
    height: int = 300
    left: int = 54
    right: int = 130
    top: int = 30
    bottom: int = 42


FRAME = Frame()


class Mark(NamedTuple):
    """A point with its interval; `low` and `high` equal to `y` draw none, and NaN is a gap."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line, or some points, of a panel."""

    label: str
    """The name at its right end; "" draws none."""
    marks: Sequence[Mark]
    color: int | str = 0
    """An index into COLORS, or a colour class of the page's style."""
    style: str = ""
    """More classes of the line, such as "thin", which draws no band, or "dashed"."""
    joined: bool = True
    """A line with a band; else points with whiskers."""
    dots: bool = False
    """A dot at every point of the line."""

    @property
    def kind(self) -> str:
        """The class of its colour."""
        return self.color if isinstance(self.color, str) else f"k{self.color % len(COLORS)}"

    @property
    def known(self) -> list[Mark]:
        """Its marks without gaps."""
        return [mark for mark in self.marks if math.isfinite(mark.y)]


@dataclass(frozen=True)
class Panel:
    """Axes and what is drawn in them."""

    title: str
    x: str
    """What the horizontal axis shows."""
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    zero: bool = False
    """Start the vertical axis at 0."""
    lines: Sequence[float] = field(default=())
    """Vertical reference lines."""
    unit: str = ""
    """What the vertical axis shows, if the title does not say it."""


def figure(panels: Sequence[Panel], source: str, columns: int = 0) -> str:
    """An SVG of `panels`, `columns` in a row (0: all); `source` names the data's file.

    Raises ValueError for a panel without any finite point.
    """
    columns = columns or len(panels)
    width, height = FRAME.width * columns, FRAME.height * -(-len(panels) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img"><desc>{escape(source)}</desc><style>{STYLE}</style>',
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        at = f"{column * FRAME.width} {row * FRAME.height}"
        parts += [f'<g transform="translate({at})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    marks = [mark for series in panel.series for mark in series.known]
    if not marks:
        raise ValueError(f"nothing to draw in {panel.title!r}: no point is finite")
    axes = Axes(
        FRAME, [*(mark.x for mark in marks), *panel.lines], _ticks_of(panel, marks), panel.log_x
    )
    yield f'<text class="title" x="{FRAME.left}" y="12">{escape(panel.title)}</text>'
    yield f'<text x="{FRAME.left}" y="26">{escape(panel.unit)}</text>' * bool(panel.unit)
    yield from axes.grid(panel.x)
    for place in panel.lines:
        x = axes.x(place)
        yield f'<path class="at" d="M{x:.1f} {FRAME.top}V{FRAME.height - FRAME.bottom}"/>'
    for series in sorted(panel.series, key=lambda s: "thin" not in s.style):
        yield from axes.draw(series)
    yield from axes.labels(panel.series)


def _ticks_of(panel: Panel, marks: Sequence[Mark]) -> list[float]:
    """Ticks of the vertical axis: all points, and of wide intervals, as of few seeds, a part."""
    middles = [mark.y for mark in marks]
    ends = [v for mark in marks for v in (mark.low, mark.high) if math.isfinite(v)]
    if panel.log_y:
        return _log_ticks(min(middles + [v for v in ends if v > 0]), max(middles + ends))
    room = (max(middles) - min(middles)) / 3 or 0.5
    low, high = min(middles) - room, max(middles) + room
    values = [*middles, *(min(max(v, low), high) for v in ends)]
    return ticks(min(0.0, *values) if panel.zero else min(values), max(values))


class Axes:
    """The map from data to the picture. The vertical axis reaches from the first to the last of
    `y_ticks`, in logarithms if they are `_LogTicks`."""

    def __init__(
        self,
        frame: Frame,
        xs: Sequence[float],
        y_ticks: Sequence[float],
        log_x: bool = False,
        whole_x: bool = False,
    ):
        self.frame, self.y_ticks, self.whole_x = frame, y_ticks, whole_x
        self._log_x = log_x
        self._fx: Callable[[float], float] = math.log10 if log_x else float
        self._fy: Callable[[float], float] = math.log10 if isinstance(y_ticks, _LogTicks) else float
        places = [self._fx(x) for x in xs]
        pad = 0.05 * (max(places) - min(places)) if log_x else 0.0
        self.x0, self.x1 = min(places) - pad, max(places) + pad
        self.y0, self.y1 = y_ticks[0], y_ticks[-1]

    def x(self, value: float) -> float:
        frame = self.frame
        share = (self._fx(value) - self.x0) / ((self.x1 - self.x0) or 1.0)
        return frame.left + share * (frame.width - frame.left - frame.right)

    def y(self, value: float) -> float:
        frame = self.frame
        value = min(max(value, self.y0), self.y1)  # an interval may leave the picture
        low, high = self._fy(self.y0), self._fy(self.y1)
        share = (self._fy(value) - low) / (high - low)
        return frame.height - frame.bottom - share * (frame.height - frame.top - frame.bottom)

    def grid(self, x_label: str) -> Iterator[str]:
        """Lines and numbers of both axes, and the name of the horizontal one."""
        frame = self.frame
        right, bottom = frame.width - frame.right, frame.height - frame.bottom
        for i, tick in enumerate(self.y_ticks):
            y = self.y(tick)
            text = _number(tick, 0 if self._fy is math.log10 else self.y_ticks[1] - self.y_ticks[0])
            yield f'<path class="{"grid" if i else "base"}" d="M{frame.left} {y:.1f}H{right}"/>'
            yield (
                f'<text class="tick" x="{frame.left - 7}" y="{y + 4:.1f}" '
                f'text-anchor="end">{text}</text>'
            )
        found = self._x_ticks()
        spacing = min((b - a for a, b in pairwise(found)), default=1.0)
        for tick in found:
            x, text = f"{self.x(tick):.1f}", _number(tick, 0 if self._log_x else spacing)
            yield f'<path class="grid" d="M{x} {frame.top}V{bottom + 4}"/>'
            yield (
                f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
            )
        middle = (frame.left + right) / 2
        yield (
            f'<text class="unit" x="{middle}" y="{frame.height - 5}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )

    def _x_ticks(self) -> list[float]:
        if self._log_x:
            found: list[float] = _log_ticks(10**self.x0, 10**self.x1)
        else:
            found = ticks(self.x0, self.x1, 5)
        inside = [tick for tick in found if self.x0 <= self._fx(tick) <= self.x1]
        inside = inside[:: 1 + len(inside) // 7]
        return [tick for tick in inside if not self.whole_x or tick == int(tick)]

    def draw(self, series: Series) -> Iterator[str]:
        """The line, its band and its dots; else the points and their whiskers."""
        kind, runs = series.kind, self._runs(series.marks)
        extra = f" {series.style}" * bool(series.style)
        if not series.joined:
            for mark in series.known:
                x, low, high = (f"{v:.1f}" for v in (self.x(mark.x), *map(self.y, mark[2:])))
                yield f'<path class="line {kind}{extra}" d="M{x} {low}V{high}"/>'
                yield self._dot(mark, kind, 3.5)
            return
        wide = any(mark.high > mark.low for run in runs for mark in run)
        if wide and "thin" not in series.style:
            yield f'<path class="band {kind}" d="{"".join(map(self._area, runs))}"/>'
        path = "".join("M" + "L".join(self._at(mark.x, mark.y) for mark in run) for run in runs)
        yield f'<path class="line {kind}{extra}" d="{path}"/>'
        size = 3.5 if len(series.marks) <= MAX_DOTS else 1.8
        for run in runs:
            if len(run) == 1 or series.dots:
                yield from (self._dot(m, kind, size if len(run) > 1 else 2.5) for m in run)

    def _runs(self, marks: Sequence[Mark]) -> list[list[Mark]]:
        """Marks that are joined: without a gap of value, or of a long stretch, between them."""
        places = [self.x(mark.x) for mark in marks if math.isfinite(mark.y)]
        steps = [b - a for a, b in pairwise(places)]
        far = GAP * median(steps) if len(steps) > 1 else math.inf
        runs: list[list[Mark]] = [[]]
        for mark in marks:
            known = math.isfinite(mark.y)
            if not known or (runs[-1] and self.x(mark.x) - self.x(runs[-1][-1].x) > far):
                runs.append([])
            if known:
                runs[-1].append(mark)
        return [run for run in runs if run]

    def _at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f} {self.y(y):.1f}"

    def _area(self, run: Sequence[Mark]) -> str:
        upper = [self._at(mark.x, mark.high) for mark in run]
        lower = [self._at(mark.x, mark.low) for mark in reversed(run)]
        return f"M{'L'.join(upper + lower)}Z"

    def _dot(self, mark: Mark, kind: str, size: float) -> str:
        x, y = self.x(mark.x), self.y(mark.y)
        return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'

    def labels(self, series: Sequence[Series]) -> Iterator[str]:
        """Names at the right ends of lines and beside points, moved where they would overlap."""
        frame = self.frame
        named = [one for one in series if one.label and one.known]
        ends = sorted(
            ((self.y(one.known[-1].y), self.x(one.known[-1].x), one) for one in named),
            key=lambda end: end[0],
        )
        joined = any(one.joined for *_, one in ends)
        heights = [y for y, *_ in ends]
        lowest = frame.height - frame.bottom
        ys = spread(heights, lowest) if joined else _beside([(x, y) for y, x, _ in ends])
        for place, (y, x, one) in zip(ys, ends, strict=True):
            kind, extra = one.kind, " dashed" * ("dashed" in one.style)
            if joined:
                x = frame.width - frame.right + 8
                stub = f"M{x - 6} {y:.1f}L{x + 2} {place:.1f}"
                yield f'<path class="line {kind}{extra}" d="{stub}"/>'
            text = escape(one.label)
            yield f'<text class="name {kind}" x="{x + 7:.1f}" y="{place + 4:.1f}">{text}</text>'


class _LogTicks(list[float]):
    """Ticks of an axis in logarithms."""


def _log_ticks(low: float, high: float) -> _LogTicks:
    """1, 2 and 5 times powers of ten around a range; over many powers, powers of ten alone."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    digits = (1, 2, 5) if len(powers) <= 5 else (1,)
    found = [digit * 10.0**power for power in powers for digit in digits]
    first = max(i for i, tick in enumerate(found) if tick <= low)
    last = min(i for i, tick in enumerate(found) if tick >= high)
    return _LogTicks(found[first : max(last, first + 1) + 1])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose the range."""
    if high - low < 1e-12 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float, spacing: float) -> str:
    """The text of a tick whose neighbours are `spacing` apart; 0: in logarithms."""
    if not spacing:
        return f"{value:g}"
    if abs(value) >= 1e6 or spacing < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(spacing) + 1e-9))}f}"


def _beside(points: Sequence[tuple[float, float]]) -> list[float]:
    """The y of each point's label, below those before it that it would cover."""
    placed: list[tuple[float, float]] = []
    for x, y in points:
        for other_x, other_y in placed:
            if abs(x - other_x) < LABEL_WIDTH and abs(y - other_y) < LABEL_HEIGHT:
                y = other_y + LABEL_HEIGHT
        placed.append((x, y))
    return [y for _, y in placed]


def spread(ys: Sequence[float], lowest: float) -> list[float]:
    """Rising `ys`, moved until each has LABEL_HEIGHT, above `lowest`."""
    moved: list[float] = []
    for y in ys:
        moved.append(max(y, moved[-1] + LABEL_HEIGHT) if moved else y)
    below = float(lowest)
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], below)
        below = moved[place] - LABEL_HEIGHT
    return moved
