"""A run's curves: from its rows to the figures of its report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from trainer.report_figures import COLORS, REWARDS, SECTIONS, Curve, Figure
from trainer.report_plots import Line, Point, plot
from trainer.skips import plain, reasons

SETS_A_FIGURE = 5

Row = Mapping[str, Any]
Columns = Mapping[str, Sequence[Point]]
"""Of each metric: (step, value) of every row that has it, None where it was not finite."""


def sections(rows: Sequence[Row], columns: Columns) -> list[dict[str, Any]]:
    """What is drawn under each title, and "missing": what is not, and why."""
    found = []
    for title, figures in SECTIONS.items():
        if figures is REWARDS:
            figures = (figures[0], *_sets(columns), *figures[1:])
        drawn, missing = [], []
        for figure in figures:
            if figure.title == "Skipped steps":
                figure, columns = _skips(figure, rows, columns)
            svg, why = draw(figure, columns)
            if why:
                missing.append(f"{figure.title}: {why}")
            else:
                drawn.append({"title": figure.title, "note": figure.note, "svg": svg})
        found.append({"title": title, "figures": drawn, "missing": missing})
    return found


def draw(figure: Figure, columns: Columns) -> tuple[Markup, str]:
    """The figure's SVG; or nothing, and why it is left out."""
    lines = []
    for curve in figure.curves:
        found = _scaled(columns.get(curve.key, ()), figure.scale)
        window = 2 * (len(found) // 40) + 1 if figure.smooth and not curve.markers else 1
        if any(y or (y is not None and not figure.events) for _, y in found):
            band = _band(curve.ends, columns, figure.scale)
            lines.append(
                Line(curve.label, found, curve.color, curve.dashed, curve.markers, window, band)
            )
    if not lines:
        if figure.events and all(curve.key in columns for curve in figure.curves):
            return Markup(), "none"
        keys = " or ".join(curve.key for curve in figure.curves)
        return Markup(), f"no value of {keys}"
    return Markup(plot(lines, figure.unit, figure.zero, figure.title)), ""


def columns_of(rows: Sequence[Row]) -> Columns:
    """The metrics of all rows, and "head/share", the head's part of the step's time."""
    columns: dict[str, list[Point]] = {}
    for row in rows:
        step = row["step"]
        for key, value in row.items():
            if key != "step":
                columns.setdefault(key, []).append((step, value))
        head, whole = row.get("time/head"), row.get("time/step")
        if head is not None and whole:
            columns.setdefault("head/share", []).append((step, head / whole))
    return columns


def _scaled(points: Sequence[Point], scale: float) -> list[Point]:
    return [(x, None if y is None else y * scale) for x, y in points]


def _band(
    ends: tuple[str, str], columns: Columns, scale: float
) -> list[tuple[float, float, float]]:
    low, high = (dict(columns.get(end, ())) for end in ends)
    found = []
    for step, value in low.items():
        other = high.get(step)
        if value is not None and other is not None:
            found.append((step, value * scale, other * scale))
    return found


def _sets(columns: Columns) -> list[Figure]:
    """Accuracy on each named set, "eval/NAME.accuracy", a few of them a figure."""
    names = [
        key.removeprefix("eval/").removesuffix(".accuracy")
        for key in columns
        if key.startswith("eval/") and key.endswith(".accuracy")
    ]
    figures = []
    for start in range(0, len(names), SETS_A_FIGURE):
        some = names[start : start + SETS_A_FIGURE]
        curves = tuple(
            Curve(f"eval/{n}.accuracy", n, color, True, ends=(f"eval/{n}.low", f"eval/{n}.high"))
            for n, color in zip(some, COLORS, strict=False)
        )
        note = "Mean over its problems. Shaded: 95% interval."
        figures.append(Figure(f"Accuracy on {', '.join(some)}", note, "%", curves, scale=100))
    return figures


def _skips(figure: Figure, rows: Sequence[Row], columns: Columns) -> tuple[Figure, Columns]:
    """The figure with a curve for each reason, and its counts up to every step."""
    found = [reasons(row) for row in rows]
    names = list(dict.fromkeys(name for some in found for name in some))[: len(COLORS)]
    counts = {
        f"skips/{name}": [
            (row["step"], float(count))
            for row, count in zip(rows, accumulate(name in some for some in found), strict=True)
        ]
        for name in names
    }
    curves = tuple(
        Curve(f"skips/{name}", plain(name), color)
        for name, color in zip(names, COLORS, strict=False)
    )
    return replace(figure, curves=curves), {**columns, **counts}
