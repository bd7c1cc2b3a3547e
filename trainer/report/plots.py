"""Line plots as inline SVG: colours from the page's style, values under the cursor.

A plot has as many points for 5,000 steps as for 150: means over equal ranges of steps, and behind
them, shaded, where eight values in ten of each range lie.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from trainer.report.charts import spread, ticks

WIDTH, HEIGHT = 450, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 98, 26, 36
MAX_POINTS = 150  # Of a line; more steps than this are averaged.
MAX_SHADES = 2  # That can be told apart where they lie over one another.
MAX_DOTS = 30  # That stay apart; more are small.
GAP = 5  # A line breaks where its next point is so many times as far as usual.
TAIL = 10  # The part of a range's values left out of its shade, on either side.
LABEL = 15  # Characters.
ROBUST = 50  # From so many values on, the axis need not reach the last hundredth on either side.

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    label: str
    """Written at its right end."""
    points: Sequence[Point]
    """(step, value); None leaves a gap."""
    color: str
    """A colour class of the page's style."""
    dashed: bool = False
    """Drawn dashed: a reference rather than a measurement."""
    markers: bool = False
    """A dot at every point, where they are few enough."""
    window: int = 1
    """Over 1: a mean over so many steps is drawn, and the steps themselves faintly behind it."""
    band: Sequence[tuple[float, float, float]] = ()
    """(step, low, high) of an interval, shaded."""


class _Mark(NamedTuple):
    """One or several neighbouring points; `y` is None in a gap."""

    x: float
    y: float | None
    low: float
    high: float


@dataclass(frozen=True)
class _Drawn:
    """A line in at most MAX_POINTS marks, and its means over `window` of them."""

    line: Line
    marks: Sequence[_Mark]
    smooth: Sequence[_Mark]
    several: bool
    """Whether a mark is several points."""

    def values(self) -> list[float]:
        """What the vertical axis has to show."""
        own = sorted(y for _, y in self.line.points if y is not None)
        drawn = sorted(mark.y for mark in self.smooth if mark.y is not None)
        if len(own) > ROBUST:
            own = own[len(own) // 100 : len(own) - len(own) // 100]
        if self.several:
            drawn = drawn[len(drawn) // 100 : len(drawn) - len(drawn) // 100]
        return [*own, *drawn, *(end for _, *ends in self.line.band for end in ends)]


def plot(lines: Sequence[Line], unit: str, zero: bool = True, title: str = "") -> str:
    """An <svg> of `lines` over RL steps; `unit` names the y axis, `zero` starts it at 0.

    Raises ValueError when no line has a value.
    """
    steps = sorted({x for line in lines for x, _ in line.points})
    if not any(y is not None for line in lines for _, y in line.points):
        raise ValueError("nothing to plot: no line has a value")
    edges = _edges(steps)
    drawn = [_thin(line, edges) for line in lines]
    values = [value for one in drawn for value in one.values()]
    low, high = min(0.0, *values) if zero else min(values), max(values)
    y_ticks = ticks(low, high if high or low else 1.0)
    axes = _Axes(steps[0], steps[-1], y_ticks[0], y_ticks[-1])
    title = title or ", ".join(line.label for line in lines)
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>',
            f"<desc>{escape(_description(lines, unit, steps))}</desc>",
            *_grid(axes, y_ticks, unit),
            *_beyond(axes, lines),
            *(part for one in drawn for part in _behind(axes, one, len(drawn) <= MAX_SHADES)),
            *(part for one in drawn for part in _line(axes, one)),
            *_end_labels(axes, drawn),
            *_hover(axes, drawn, steps, edges),
            "</svg>",
        ]
    )


def shaded(line: Line) -> bool:
    """Whether `plot` shades where its single steps lie: of many, without intervals of their own."""
    return len(line.points) > MAX_POINTS and not line.band


@dataclass(frozen=True)
class _Axes:
    """From data to the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / max(self.x1 - self.x0, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = min(max(value, self.y0), self.y1)  # what is rare may lie beyond
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _edges(steps: Sequence[float]) -> list[float]:
    """The lower ends of equal ranges of steps; none where each step has a point of its own."""
    if len(steps) <= MAX_POINTS:
        return []
    size = (steps[-1] + 1 - steps[0]) / MAX_POINTS
    return [steps[0] + size * i for i in range(MAX_POINTS)]


def _place(step: float, edges: Sequence[float]) -> int:
    """The number of the range that `step` is in."""
    size = edges[1] - edges[0]
    return min(int((step - edges[0]) / size + 1e-9), len(edges) - 1)


def _thin(line: Line, edges: Sequence[float]) -> _Drawn:
    """The line with its marks: of each point, or of each range of steps."""
    if len(line.points) <= MAX_POINTS:
        marks = [_Mark(x, y, y or 0.0, y or 0.0) for x, y in line.points]
        return _Drawn(line, marks, _rolling(marks, line.window), False)
    ranges: dict[int, list[Point]] = {}
    for point in line.points:
        ranges.setdefault(_place(point[0], edges), []).append(point)
    marks = []
    for points in ranges.values():
        known = sorted(y for _, y in points if y is not None) or [0.0]
        mean = None if all(y is None for _, y in points) else math.fsum(known) / len(known)
        tenth = len(known) // TAIL
        marks.append(_Mark(points[-1][0], mean, known[tenth], known[-1 - tenth]))
    window = max(1, line.window * len(marks) // len(line.points))
    return _Drawn(line, marks, _rolling(marks, window), True)


def _rolling(marks: Sequence[_Mark], window: int) -> list[_Mark]:
    """With the mean over `window` marks centred on each, fewer at the ends."""
    half = window // 2
    smooth = []
    for i, mark in enumerate(marks):
        near = [m.y for m in marks[max(0, i - half) : i + half + 1] if m.y is not None]
        smooth.append(mark if mark.y is None else mark._replace(y=sum(near) / len(near)))
    return smooth


def _number(value: float, spacing: float) -> str:
    """Of a tick, whose neighbours are `spacing` apart."""
    if abs(value) >= 1e6 or 0 < spacing < 1e-4:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9)) if spacing else 2
    return f"{value:,.{decimals}f}"


def _description(lines: Sequence[Line], unit: str, steps: Sequence[float]) -> str:
    """For those who do not see the picture."""
    told = []
    for line in lines:
        known = [y for _, y in line.points if y is not None]
        if known:
            told.append(
                f"{line.label} {known[-1]:.4g} at last, {min(known):.4g} to {max(known):.4g}"
            )
    return f"Steps {steps[0]:,.0f} to {steps[-1]:,.0f}, in {unit}: {'; '.join(told)}."


def _grid(axes: _Axes, y_ticks: Sequence[float], unit: str) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<text class="unit" x="4" y="12">{escape(unit)}</text>'
    for tick in y_ticks:
        y = axes.y(tick)
        kind = "base" if tick == y_ticks[0] else "grid"
        yield f'<path class="{kind}" d="M{LEFT} {y:.1f}H{right}"/>'
        text = _number(tick, y_ticks[1] - y_ticks[0])
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in ticks(axes.x0, axes.x1, 5):
        if tick == int(tick) and axes.x0 <= tick <= axes.x1:
            x = f"{axes.x(tick):.1f}"
            yield f'<path class="base" d="M{x} {bottom}v4"/>'
            yield (
                f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:,.0f}'
                "</text>"
            )
    middle = (LEFT + right) / 2
    yield f'<text class="unit" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">RL step</text>'


def _beyond(axes: _Axes, lines: Sequence[Line]) -> Iterator[str]:
    """A word on values that the axis does not reach."""
    values = [y for line in lines for _, y in line.points if y is not None]
    room = 0.25 * (axes.y1 - axes.y0)  # Not worth a word.
    ends = [
        f"{value:.3g}"
        for value in (min(values), max(values))
        if not axes.y0 - room <= value <= axes.y1 + room
    ]
    if ends:
        text = f"not shown: single steps up to {' and '.join(ends)}"
        yield f'<text class="unit" x="{WIDTH - 4}" y="12" text-anchor="end">{text}</text>'


def _behind(axes: _Axes, one: _Drawn, shade: bool) -> Iterator[str]:
    """Intervals, and the single steps where a mean is drawn; of ranges of them only if `shade`."""
    kind = f"line {one.line.color}"
    if one.line.band:
        band = [_Mark(x, (low + high) / 2, low, high) for x, low, high in one.line.band]
        if len(band) > MAX_POINTS:
            band = band[:: math.ceil(len(band) / MAX_POINTS)]
        yield f'<path class="band {one.line.color}" d="{_area(axes, band)}"/>'
    elif shade and shaded(one.line):
        yield f'<path class="band {one.line.color}" d="{_area(axes, one.marks)}"/>'
    elif one.line.window > 1 and not one.several:
        yield f'<path class="{kind} faint" d="{_path(axes, one.marks)}"/>'


def _line(axes: _Axes, one: _Drawn) -> Iterator[str]:
    color = one.line.color
    dashed = " dashed" if one.line.dashed else ""
    yield f'<path class="line {color}{dashed}" d="{_path(axes, one.smooth)}"/>'
    few = len(one.marks) <= MAX_DOTS
    for run in _runs(one.smooth):
        if len(run) == 1 or (one.line.markers and not one.several):
            for mark in run:
                size = "3.5" if few and len(run) > 1 else "1.8" if len(run) > 1 else "2.5"
                x, y = axes.x(mark.x), axes.y(mark.y or 0.0)
                yield f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'


def _runs(marks: Sequence[_Mark]) -> list[list[_Mark]]:
    """Marks that are joined: without a gap of value, or of many steps, between them."""
    known = [mark for mark in marks if mark.y is not None]
    far = GAP * median([b.x - a.x for a, b in pairwise(known)]) if len(known) > 2 else math.inf
    runs: list[list[_Mark]] = [[]]
    for mark in marks:
        if mark.y is None or (runs[-1] and mark.x - runs[-1][-1].x > far):
            runs.append([])
        if mark.y is not None:
            runs[-1].append(mark)
    return [run for run in runs if run]


def _path(axes: _Axes, marks: Sequence[_Mark]) -> str:
    return "".join(
        "M" + "L".join(f"{axes.x(mark.x):.1f} {axes.y(mark.y or 0.0):.1f}" for mark in run)
        for run in _runs(marks)
    )


def _area(axes: _Axes, marks: Sequence[_Mark]) -> str:
    """Between the low and high ends."""
    parts = []
    for run in _runs(marks):
        upper = [f"{axes.x(mark.x):.1f} {axes.y(mark.high):.1f}" for mark in run]
        lower = [f"{axes.x(mark.x):.1f} {axes.y(mark.low):.1f}" for mark in reversed(run)]
        parts.append(f"M{'L'.join(upper + lower)}Z")
    return "".join(parts)


def _end_labels(axes: _Axes, drawn: Sequence[_Drawn]) -> Iterator[str]:
    """Names at the lines' right ends, moved apart where they would overlap."""
    ends = []
    for one in drawn:
        last = [mark for mark in one.smooth if mark.y is not None]
        if last:
            ends.append((axes.y(last[-1].y or 0.0), one.line))
    ends.sort(key=lambda end: end[0])
    x = WIDTH - RIGHT + 6
    for place, (y, line) in zip(spread([y for y, _ in ends], HEIGHT - BOTTOM), ends, strict=True):
        dashed = " dashed" if line.dashed else ""
        yield f'<path class="line {line.color}{dashed}" d="M{x - 4} {y:.1f}L{x + 6} {place:.1f}"/>'
        label = line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…"
        yield f'<text class="name" x="{x + 10}" y="{place + 4:.1f}">{escape(label)}</text>'


def _hover(
    axes: _Axes, drawn: Sequence[_Drawn], steps: Sequence[float], edges: Sequence[float]
) -> Iterator[str]:
    """Invisible columns, of a step or a range of steps, with their values as tooltips."""
    if edges:
        bounds = [axes.x(x) for x in edges] + [axes.x(steps[-1]) + 2]
        spans = [*(f"{a:,.0f} to {b:,.0f}" for a, b in pairwise(map(math.ceil, edges))), ""]
        spans[-1] = f"{edges[-1]:,.0f} to {steps[-1]:,.0f}"
        spans = [f"steps {span}" for span in spans]
    else:
        middles = [(axes.x(a) + axes.x(b)) / 2 for a, b in pairwise(steps)]
        # The first and last columns reach past their point, so that a single step has a width.
        bounds = [axes.x(steps[0]) - 4, *middles, axes.x(steps[-1]) + 4]
        spans = [f"step {step:,.0f}" for step in steps]
    number = {step: i for i, step in enumerate(steps)}
    texts = [[span] for span in spans]
    for one in drawn:
        for mark in one.marks:
            if mark.y is not None:
                at = _place(mark.x, edges) if edges else number[mark.x]
                ends = f" ({mark.low:.4g} to {mark.high:.4g})" if mark.low < mark.high else ""
                texts[at].append(f"{one.line.label}: {mark.y:.4g}{ends}")
    for (left, right), text in zip(pairwise(bounds), texts, strict=True):
        if len(text) > 1:
            yield (
                f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(chr(10).join(text))}</title>'
                "</rect>"
            )
