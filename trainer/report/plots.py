"""Plots of a run's page: many steps drawn as few points, and values under the cursor.

A plot has as many points for 5,000 steps as for 150: means over equal ranges of steps, and behind
them, shaded, where eight values in ten of each range lie.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from trainer.report.charts import Axes, Frame, Mark, Series, ticks

FRAME = Frame(450, 230, 52, 98, 26, 36)
MAX_POINTS = 150
"""The points of a line; over more steps than this, means are drawn."""
MAX_SHADES = 2
"""Shades that can be told apart where they lie over one another."""
TAIL = 10
"""One in this many of a range's values lies below its shade, and as many above."""
LABEL = 15
"""The longest label, in characters."""
ROBUST = 50
"""With more values than this the axis may leave out one in a hundred at either end."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    label: str
    """The name at its right end."""
    points: Sequence[Point]
    """(step, value); None leaves a gap."""
    color: str
    """A colour class of the page's style."""
    dashed: bool = False
    """Drawn dashed: a reference, not a measurement."""
    markers: bool = False
    """A dot at every point, where there is no range of steps."""
    window: int = 1
    """Over 1: a mean over so many steps is drawn, and the steps themselves faintly behind it."""
    band: Sequence[tuple[float, float, float]] = ()
    """(step, low, high) of an interval, shaded."""


@dataclass(frozen=True)
class _Drawn:
    """A line in at most MAX_POINTS marks."""

    line: Line
    marks: Sequence[Mark]
    """The points, or the means of ranges of steps; with intervals, or the ends of eight in ten."""
    smooth: Sequence[Mark]
    """The same, with means over `window` of them."""
    several: bool
    """Whether a mark is several points."""

    def values(self) -> list[float]:
        """What the vertical axis has to show."""
        own = sorted(y for _, y in self.line.points if y is not None)
        drawn = sorted(mark.y for mark in self.smooth if math.isfinite(mark.y))
        if len(own) > ROBUST:
            own = own[len(own) // 100 : len(own) - len(own) // 100]
        if self.several:
            drawn = drawn[len(drawn) // 100 : len(drawn) - len(drawn) // 100]
        return [*own, *drawn, *(end for _, *ends in self.line.band for end in ends)]

    def series(self, shade: bool) -> list[Series]:
        """Faint single steps, if any, and the line; ranges of steps are shaded if `shade`."""
        line, found = self.line, []
        if line.window > 1 and not self.several:
            found.append(Series("", self.marks, line.color, "thin faint"))
        marks = self.smooth
        if not line.band and not (shade and shaded(line)):
            marks = [mark._replace(low=mark.y, high=mark.y) for mark in marks]
        label = line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…"
        dots = line.markers and not self.several
        return [*found, Series(label, marks, line.color, "dashed" * line.dashed, dots=dots)]


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
    axes = Axes(FRAME, steps, ticks(low, high if high or low else 1.0), whole_x=True)
    series = [part for one in drawn for part in one.series(len(drawn) <= MAX_SHADES)]
    title = title or ", ".join(line.label for line in lines)
    return "".join(
        [
            f'<svg viewBox="0 0 {FRAME.width} {FRAME.height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(_description(lines, unit, steps))}</desc>",
            f'<text class="unit" x="4" y="12">{escape(unit)}</text>',
            *axes.grid("RL step"),
            *_beyond(axes, lines),
            *(part for one in series for part in axes.draw(one)),
            *axes.labels(series),
            *_hover(axes, drawn, steps, edges),
            "</svg>",
        ]
    )


def shaded(line: Line) -> bool:
    """Whether `plot` shades where single steps lie: a line of many, without its own intervals."""
    return len(line.points) > MAX_POINTS and not line.band


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
    """The line with its marks: one for each point, or for each range of steps."""
    band = {step: ends for step, *ends in line.band}
    points = [_mark(x, y, band.get(x)) for x, y in line.points]
    if len(points) <= MAX_POINTS:
        return _Drawn(line, points, _rolling(points, line.window), False)
    ranges: dict[int, list[Mark]] = {}
    for point in points:
        ranges.setdefault(_place(point.x, edges), []).append(point)
    marks = [_joined(some, bool(band)) for some in ranges.values()]
    window = max(1, line.window * len(marks) // len(points))
    return _Drawn(line, marks, _rolling(marks, window), True)


def _mark(x: float, y: float | None, ends: Sequence[float] | None) -> Mark:
    value = math.nan if y is None else y
    low, high = ends or (value, value)
    return Mark(x, value, low, high)


def _joined(marks: Sequence[Mark], band: bool) -> Mark:
    """The mean of `marks`, with the mean ends of their intervals, or those of eight in ten."""
    known = sorted((mark for mark in marks if math.isfinite(mark.y)), key=lambda mark: mark.y)
    if not known:
        return marks[-1]
    y, low, high = (math.fsum(ends) / len(known) for ends in list(zip(*known, strict=True))[1:])
    if not band:
        tenth = len(known) // TAIL
        low, high = known[tenth].y, known[-1 - tenth].y
    return Mark(marks[-1].x, y, low, high)


def _rolling(marks: Sequence[Mark], window: int) -> list[Mark]:
    """`marks`, each at the mean over the `window` marks around it, fewer at the ends."""
    half = window // 2
    smooth = []
    for i, mark in enumerate(marks):
        near = [m.y for m in marks[max(0, i - half) : i + half + 1] if math.isfinite(m.y)]
        known = math.isfinite(mark.y)
        smooth.append(mark._replace(y=math.fsum(near) / len(near)) if known else mark)
    return smooth


def _description(lines: Sequence[Line], unit: str, steps: Sequence[float]) -> str:
    """What the picture shows, in words."""
    told = []
    for line in lines:
        known = [y for _, y in line.points if y is not None]
        if known:
            told.append(
                f"{line.label} {known[-1]:.4g} at last, {min(known):.4g} to {max(known):.4g}"
            )
    return f"Steps {steps[0]:,.0f} to {steps[-1]:,.0f}, in {unit}: {'; '.join(told)}."


def _beyond(axes: Axes, lines: Sequence[Line]) -> Iterator[str]:
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
        yield f'<text class="unit" x="{FRAME.width - 4}" y="12" text-anchor="end">{text}</text>'


def _hover(
    axes: Axes, drawn: Sequence[_Drawn], steps: Sequence[float], edges: Sequence[float]
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
            if math.isfinite(mark.y):
                at = _place(mark.x, edges) if edges else number[mark.x]
                ends = f" ({mark.low:.4g} to {mark.high:.4g})" if mark.low < mark.high else ""
                texts[at].append(f"{one.line.label}: {mark.y:.4g}{ends}")
    for (left, right), text in zip(pairwise(bounds), texts, strict=True):
        if len(text) > 1:
            told, height = escape("\n".join(text)), FRAME.height - FRAME.top - FRAME.bottom
            yield (
                f'<rect class="hit" x="{left:.1f}" y="{FRAME.top}" width="{right - left:.1f}" '
                f'height="{height}"><title>{told}</title></rect>'
            )
