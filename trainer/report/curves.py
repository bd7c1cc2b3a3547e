"""A run's curves: from its rows to the figures of its report."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from trainer.report.figures import COLORS, REWARDS, SECTIONS, Curve, Figure
from trainer.report.plots import MAX_SHADES, Line, Point, plot, shaded
from trainer.report.progress import evaluated
from trainer.report.skips import reasons

SETS_A_FIGURE = 5

Row = Mapping[str, Any]
Columns = Mapping[str, Sequence[Point]]
"""Each metric's (step, value) in every row that has it; None where it was not finite."""


def sections(rows: Sequence[Row], columns: Columns) -> list[dict[str, Any]]:
    """What is drawn under each title, and "missing": what is not, and why."""
    columns = {**columns, **_sums(rows)}
    found = []
    for title, figures in SECTIONS.items():
        if figures is REWARDS:
            figures = (figures[0], *_sets(columns), *figures[1:])
        drawn, missing = [], []
        for figure in figures:
            svg, note = draw(figure, columns)
            if svg:
                drawn.append({"title": figure.title, "note": note, "svg": svg})
            else:
                missing.append(f"{figure.title}: {note}")
        found.append({"title": title, "figures": drawn, "missing": missing})
    return found


def draw(figure: Figure, columns: Columns) -> tuple[Markup, str]:
    """The figure's SVG and what to know of it; or nothing, and why it is left out."""
    lines, curves = [], figure.curves
    if figure.group:
        names = [key.removeprefix(figure.group) for key in columns if key.startswith(figure.group)]
        curves = tuple(
            Curve(figure.group + name, name.replace("_", " "), color)
            for name, color in zip(names, COLORS, strict=False)
        )
    for curve in curves:
        found = _scaled(columns.get(curve.key, ()), figure.scale)
        window = 2 * (len(found) // 40) + 1 if figure.smooth and not curve.markers else 1
        if any(y or (y is not None and not figure.events) for _, y in found):
            band = _band(curve.ends, columns, figure.scale)
            lines.append(
                Line(curve.label, found, curve.color, curve.dashed, curve.markers, window, band)
            )
    if not lines:
        if figure.events and all(curve.key in columns for curve in curves):
            return Markup(), "none"
        keys = " or ".join(curve.key for curve in curves)
        return Markup(), f"no value of {keys}"
    notes = [figure.note]
    if (window := max(line.window for line in lines)) > 1:
        notes.append(f"Line: mean over {window} steps.")
    if len(lines) <= MAX_SHADES and not figure.events and any(shaded(line) for line in lines):
        notes.append("Shade: eight steps in ten.")
    return Markup(plot(lines, figure.unit, figure.zero, figure.title)), " ".join(notes)


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
    names = list(evaluated(columns))
    figures = []
    for start in range(0, len(names), SETS_A_FIGURE):
        some = names[start : start + SETS_A_FIGURE]
        curves = tuple(
            Curve(f"eval/{n}.accuracy", n, color, True, ends=(f"eval/{n}.low", f"eval/{n}.high"))
            for n, color in zip(some, COLORS, strict=False)
        )
        note = "Sampled responses. Shaded: 95% interval of the mean over problems."
        figures.append(Figure(f"Accuracy on {', '.join(some)}", note, "%", curves))
    return figures


def _sums(rows: Sequence[Row]) -> Columns:
    """Counts up to each step: "skips/REASON" of skipped ones, "failures/KIND" of the verifier's."""
    found = [reasons(row) for row in rows]
    names = dict.fromkeys(name for some in found for name in some)
    counts: dict[str, list[float]] = {
        f"skips/{name}": [float(name in some) for some in found] for name in names
    }
    for name in ("timeouts", "crashes"):
        if any(f"reward/{name}" in row for row in rows):
            counts[f"failures/{name}"] = [row.get(f"reward/{name}") or 0.0 for row in rows]
    return {
        key: [(row["step"], total) for row, total in zip(rows, accumulate(own), strict=True)]
        for key, own in counts.items()
    }
