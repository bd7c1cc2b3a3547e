"""The plots of cost: SVG by hand, so that the same numbers give the same file.

They follow the reader's light or dark scheme.
"""

import math
from collections.abc import Callable
from typing import Any

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 128, 44, 48
# Panels that one make has.
SWEEPS = 3
NAMES = {
    "cpu": "ours, compiled",
    "torch": "ours, PyTorch",
    "floor": "torch.mm alone",
}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3d444d }
.title { font-weight: 600; font-size: 13px }
.grid { stroke: #8b949e; stroke-opacity: .25 }
.line { fill: none; stroke-width: 2 }
.band { stroke: none; fill-opacity: .15 }
.cpu, .bf16 { stroke: #d1590f; fill: #d1590f }
.torch, .fp32 { stroke: #0a6fd1; fill: #0a6fd1 }
.floor { stroke: #6e7781; fill: #6e7781; stroke-dasharray: 2 3 }
.eager { stroke: #6e7781; stroke-width: 2 }
.line.cpu, .line.torch, .line.floor, .line.bf16, .line.fp32 { fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9 }
  .cpu, .bf16 { stroke: #ff9a57; fill: #ff9a57 }
  .torch, .fp32 { stroke: #58a6ff; fill: #58a6ff }
  .floor, .eager { stroke: #8b949e }
  .line { fill: none }
}
"""

RUN_STYLE = """
.error { fill: none; stroke-width: 1.2 }
.fsdp2 { stroke-dasharray: 5 3 }
.r0 { stroke: #0a6fd1; fill: #0a6fd1 }
.r1 { stroke: #d1590f; fill: #d1590f }
.r2 { stroke: #1a7f37; fill: #1a7f37 }
.r3 { stroke: #8250df; fill: #8250df }
@media (prefers-color-scheme: dark) {
  .r0 { stroke: #58a6ff; fill: #58a6ff }
  .r1 { stroke: #ff9a57; fill: #ff9a57 }
  .r2 { stroke: #3fb950; fill: #3fb950 }
  .r3 { stroke: #bc8cff; fill: #bc8cff }
}
.line { fill: none }
"""


def plot(panels: list[dict[str, Any]]) -> str:
    """One panel a run. `lines` has (fraction, p20, p50, p80) by name."""
    top = _ceiling(panels)
    title = "CPU time of a step against eager, by fraction of tokens"
    return _page(title, [_panel(panel, top) for panel in panels])


def plot_cost(panels: list[dict[str, Any]]) -> str:
    """One panel a sweep, a row of them a make. `lines` has a label and (value, p20, p50, p80) in
    seconds by name."""
    title = "Time of a step against tokens, vocabulary and fraction of tokens"
    return _page(title, [_cost_panel(panel) for panel in panels], columns=SWEEPS)


def plot_runs(panels: list[dict[str, Any]]) -> str:
    """One panel a metric over steps. `lines` has a label, (step, low, value, high) and whether to
    draw the points with their intervals, by the classes of the line."""
    title = "Accuracy, reward and mismatch over the steps of four runs"
    return _page(title, [_run_panel(panel) for panel in panels], STYLE + RUN_STYLE)


def _page(title: str, panels: list[list[str]], style: str = STYLE, columns: int = 0) -> str:
    """`columns` panels a row; 0: all in one."""
    columns = columns or len(panels)
    width, height = WIDTH * columns, HEIGHT * -(-len(panels) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{title}">',
        f"<style>{style}</style>",
    ]
    for number, panel in enumerate(panels):
        at = f"{number % columns * WIDTH} {number // columns * HEIGHT}"
        parts += [f'<g transform="translate({at})">', *panel, "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ceiling(panels: list[dict[str, Any]]) -> float:
    """The largest value shown, up to the next quarter; at least eager's 1."""
    values = [point[3] for panel in panels for line in panel["lines"].values() for point in line]
    return max(1.25, -(-max(values) // 0.25) * 0.25)


def _panel(panel: dict[str, Any], top: float) -> list[str]:
    def x(fraction: float) -> float:
        return round(LEFT + fraction * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    shape = panel["shape"]
    parts = [
        f'<text class="title" x="{LEFT}" y="18">{panel["title"]}, {shape["tokens"]} x '
        f"{shape['hidden']} x {shape['vocabulary']}</text>",
        f'<text x="{LEFT}" y="34">CPU time of a step, eager = 1</text>',
        f'<text x="{x(0.5)}" y="{HEIGHT - 10}" text-anchor="middle">'
        "fraction of tokens trained on</text>",
    ]
    step = 0.25 if top <= 1.5 else 0.5
    for tick in range(int(top / step) + 1):
        value = tick * step
        parts.append(f'<path class="grid" d="M{x(0)} {y(value)}H{x(1)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for fraction in (0.1, 0.2, 0.5, 1.0):
        parts.append(
            f'<text x="{x(fraction)}" y="{HEIGHT - 30}" text-anchor="middle">{fraction:g}</text>'
        )
    parts.append(f'<path class="eager" d="M{x(0)} {y(1)}H{x(1)}"/>')
    labels = [(y(1), "eager")]
    for name, points in panel["lines"].items():
        points = sorted(points)
        parts += [_band(name, points, x, y), _line(name, points, x, y)]
        labels.append((y(points[-1][2]), NAMES[name]))
    for height, label in _apart(labels):
        parts.append(f'<text x="{x(1) + 8}" y="{height + 4}">{label}</text>')
    return parts


def _cost_panel(panel: dict[str, Any]) -> list[str]:
    """Both axes in logarithms, or from zero."""
    points = [point for _, line in panel["lines"].values() for point in line]
    values = sorted({point[0] for point in points})
    lowest, highest = min(point[1] for point in points), max(point[3] for point in points)
    if panel["log"]:
        ticks = [10.0**e for e in range(_exponent(lowest), _exponent(highest) + 2)]
        marks = values[:: max(len(values) // 4, 1)]
        x = _scale(math.log(values[0]), math.log(values[-1]), LEFT, WIDTH - RIGHT, math.log)
        y = _scale(math.log(ticks[0]), math.log(ticks[-1]), HEIGHT - BOTTOM, TOP, math.log)
    else:
        step = 10.0 ** _exponent(highest)
        step = step if highest / step > 4 else step / 2 if highest / step > 2 else step / 4
        ticks = [step * tick for tick in range(int(highest / step) + 2)]
        marks = [value for value in values if value >= values[-1] / 5]
        x = _scale(0, values[-1], LEFT, WIDTH - RIGHT, float)
        y = _scale(0, ticks[-1], HEIGHT - BOTTOM, TOP, float)
    left, right = LEFT, WIDTH - RIGHT
    parts = [
        f'<text class="title" x="{LEFT}" y="18">{panel["title"]}</text>',
        f'<text x="{LEFT}" y="34">seconds of a step</text>',
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left} {y(tick)}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for mark in marks:
        at = f'x="{x(mark)}" y="{HEIGHT - 30}"'
        parts.append(f'<text {at} text-anchor="middle">{_short(mark)}</text>')
    labels = []
    for name, (label, line) in panel["lines"].items():
        line = sorted(line)
        parts += [_band(name, line, x, y), _line(name, line, x, y)]
        for value, _, middle, _ in line:
            parts.append(f'<circle class="{name}" cx="{x(value)}" cy="{y(middle)}" r="2.5"/>')
        labels.append((y(line[-1][2]), label))
    for height, label in _apart(labels):
        parts.append(f'<text x="{right + 8}" y="{height + 4}">{label}</text>')
    return parts


def _run_panel(panel: dict[str, Any]) -> list[str]:
    """Steps from zero; values from the tick below the lowest, in tenths or in logarithms."""
    points = [point for _, line, _ in panel["lines"].values() for point in line]
    lowest, highest = min(point[1] for point in points), max(point[3] for point in points)
    if panel["log"]:
        powers = range(_exponent(lowest) - 1, _exponent(highest) + 2)
        round_ones = [digit * 10.0**e for e in powers for digit in (1, 2, 5)]
        bottom = max(value for value in round_ones if value <= lowest)
        top = min(value for value in round_ones if value > highest)
        ticks = [value for value in round_ones if bottom <= value <= top]
        y = _scale(math.log(bottom), math.log(top), HEIGHT - BOTTOM, TOP, math.log)
    else:
        first, last = math.floor(lowest * 10), math.ceil(highest * 10)
        ticks = [tick / 10 for tick in range(first, last + 1)]
        y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, float)
    steps = max(point[0] for point in points)
    x = _scale(0, steps, LEFT, WIDTH - RIGHT - 16, float)
    parts = [
        f'<text class="title" x="{LEFT}" y="18">{panel["title"]}</text>',
        f'<text x="{LEFT}" y="34">{panel["unit"]}</text>',
        f'<text x="{x(steps / 2)}" y="{HEIGHT - 10}" text-anchor="middle">step</text>',
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x(0)} {y(tick)}H{x(steps)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for mark in range(0, steps + 1, max(steps // 5, 1)):
        parts.append(f'<text x="{x(mark)}" y="{HEIGHT - 30}" text-anchor="middle">{mark}</text>')
    labels = []
    for number, (name, (label, line, intervals)) in enumerate(panel["lines"].items()):
        parts.append(_line(name, line, x, y))
        for step, low, value, high in line if intervals else []:
            # Beside each other, or one interval would cover the next.
            at = round(x(step) + 3 * (number - (len(panel["lines"]) - 1) / 2), 1)
            kind = name.split()[0]
            parts.append(f'<path class="error {kind}" d="M{at} {y(low)}V{y(high)}"/>')
            parts.append(f'<circle class="{kind}" cx="{at}" cy="{y(value)}" r="2"/>')
        labels.append((y(line[-1][2]), label, name.split()[0]))
    kinds = {label: kind for _, label, kind in labels}
    for height, label in _apart([(height, label) for height, label, _ in labels]):
        style = f'class="{kinds[label]}" style="stroke:none"'
        parts.append(f'<text {style} x="{x(steps) + 12}" y="{height + 4}">{label}</text>')
    return parts


def _scale(
    low: float, high: float, start: float, end: float, transform: Callable[[float], float]
) -> Callable[[float], float]:
    """From a value to its place, where low and high are values after `transform`."""
    return lambda value: round(start + (transform(value) - low) / (high - low) * (end - start), 1)


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))


def _short(value: float) -> str:
    """Thousands as powers of two count them: 32k is 32768."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _line(name: str, points: Any, x: Any, y: Any) -> str:
    path = "L".join(f"{x(fraction)} {y(middle)}" for fraction, _, middle, _ in points)
    return f'<path class="line {name}" d="M{path}"/>'


def _band(name: str, points: Any, x: Any, y: Any) -> str:
    lower = [f"{x(fraction)} {y(low)}" for fraction, low, _, _ in points]
    upper = [f"{x(fraction)} {y(high)}" for fraction, _, _, high in reversed(points)]
    return f'<path class="band {name}" style="stroke:none" d="M{"L".join(lower + upper)}Z"/>'


def _apart(labels: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Heights moved down until no label covers another."""
    placed: list[tuple[float, str]] = []
    for height, label in sorted(labels):
        if placed:
            height = max(height, placed[-1][0] + 13)
        placed.append((round(height, 1), label))
    return placed
