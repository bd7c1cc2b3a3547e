"""Line plots as inline SVG: colours from the page's style, values under the cursor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

WIDTH, HEIGHT = 450, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 98, 26, 36
MAX_POINTS = 200  # More steps than this are averaged in buckets.
LABEL_HEIGHT = 14

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
    """A dot at every point: few measurements."""
    window: int = 1
    """Over 1: a mean over so many steps is drawn, and the steps themselves faintly behind it."""


def plot(lines: Sequence[Line], unit: str, zero: bool = True) -> str:
    """An <svg> of `lines` over RL steps; `unit` names the y axis, `zero` starts it at 0.

    Raises ValueError when no line has a value.
    """
    lines = [_thin(line) for line in lines]
    values = [y for line in lines for _, y in line.points if y is not None]
    if not values:
        raise ValueError("nothing to plot: no line has a value")
    steps = sorted({x for line in lines for x, _ in line.points})
    y_ticks = _ticks(min(0.0, *values) if zero else min(values), max(values), 4)
    axes = _Axes(steps[0], steps[-1], y_ticks[0], y_ticks[-1])
    name = escape(", ".join(line.label for line in lines))
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}: {escape(unit)}">',
            *_grid(axes, y_ticks, unit),
            *(part for line in lines for part in _line(axes, line)),
            *_end_labels(axes, lines),
            *_hover(axes, lines, steps),
            "</svg>",
        ]
    )


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
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose the range."""
    if high - low < 1e-12 * max(abs(high), 1):
        high, low = max(high, 0.0) or 1.0, min(low, 0.0)
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, spacing: float) -> str:
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9)) if spacing else 2
    return f"{value:,.{decimals}f}"


def _grid(axes: _Axes, y_ticks: Sequence[float], unit: str) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<text class="unit" x="4" y="12">{escape(unit)}</text>'
    for tick in y_ticks:
        y = axes.y(tick)
        kind = "base" if tick == y_ticks[0] else "grid"
        yield f'<path class="{kind}" d="M{LEFT} {y:.1f}H{right}"/>'
        text = _number(tick, y_ticks[1] - y_ticks[0])
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in _ticks(axes.x0, axes.x1, 5):
        if tick == int(tick) and axes.x0 <= tick <= axes.x1:
            x = f"{axes.x(tick):.1f}"
            yield f'<path class="base" d="M{x} {bottom}v4"/>'
            yield (
                f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:,.0f}'
                "</text>"
            )
    middle = (LEFT + right) / 2
    yield f'<text class="unit" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">RL step</text>'


def _line(axes: _Axes, line: Line) -> Iterator[str]:
    kind = f"line {line.color}{' dashed' if line.dashed else ''}"
    if line.window > 1:
        yield f'<path class="{kind} faint" d="{_path(axes, line.points)}"/>'
    yield f'<path class="{kind}" d="{_path(axes, _rolling(line.points, line.window))}"/>'
    for i, (x, y) in enumerate(line.points):
        alone = all(
            not 0 <= j < len(line.points) or line.points[j][1] is None for j in (i - 1, i + 1)
        )
        if y is not None and (line.markers or alone):
            yield (
                f'<circle class="dot {line.color}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
                ' r="3.5"/>'
            )


def _path(axes: _Axes, points: Sequence[Point]) -> str:
    runs = [list(run) for some, run in groupby(points, lambda p: p[1] is not None) if some]
    return "".join(
        "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in run if y is not None)
        for run in runs
    )


def _end_labels(axes: _Axes, lines: Sequence[Line]) -> Iterator[str]:
    """Names at the lines' right ends, moved apart where they would overlap."""
    ends = []
    for line in lines:
        last = [point for point in _rolling(line.points, line.window) if point[1] is not None]
        if last:
            ends.append((axes.y(last[-1][1] or 0.0), line))
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + LABEL_HEIGHT) if places else y)
    lowest: float = HEIGHT - BOTTOM
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - LABEL_HEIGHT
    x = WIDTH - RIGHT + 6
    for place, (y, line) in zip(places, ends, strict=True):
        dashed = " dashed" if line.dashed else ""
        yield f'<path class="line {line.color}{dashed}" d="M{x - 4} {y:.1f}L{x + 6} {place:.1f}"/>'
        yield f'<text class="name" x="{x + 10}" y="{place + 4:.1f}">{escape(line.label)}</text>'


def _hover(axes: _Axes, lines: Sequence[Line], steps: Sequence[float]) -> Iterator[str]:
    """One invisible column a step that shows its values as the browser's own tooltip."""
    found = [dict(line.points) for line in lines]
    edges = [axes.x(x) for x in steps]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    # The first and last columns reach past their point, so that a single step has a width.
    bounds = [edges[0] - 4, *middles, edges[-1] + 4]
    for i, step in enumerate(steps):
        rows = [f"step {step:,.0f}"]
        for line, values in zip(lines, found, strict=True):
            if (value := values.get(step)) is not None:
                rows.append(f"{line.label}: {value:.4g}")
        yield (
            f'<rect class="hit" x="{bounds[i]:.1f}" y="{TOP}" '
            f'width="{bounds[i + 1] - bounds[i]:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(chr(10).join(rows))}</title></rect>"
        )


def _thin(line: Line) -> Line:
    """The line in at most MAX_POINTS points: means of equally many neighbours."""
    size = math.ceil(len(line.points) / MAX_POINTS)
    if size <= 1:
        return line
    buckets = [line.points[i : i + size] for i in range(0, len(line.points), size)]
    points = [(bucket[-1][0], _mean([y for _, y in bucket])) for bucket in buckets]
    window = max(1, line.window // size)
    return Line(line.label, points, line.color, line.dashed, line.markers, window)


def _rolling(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over `window` points centred on each, fewer at the ends."""
    half = window // 2
    return [
        (x, None if y is None else _mean([v for _, v in points[max(0, i - half) : i + half + 1]]))
        for i, (x, y) in enumerate(points)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
