"""The figures of a run's report: which metrics, in which unit, and how they are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from trainer.report_plots import Line, Point, plot

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric on a figure."""

    key: str
    label: str
    color: str
    markers: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot of the page: what it shows, in which unit, and what to read from it."""

    title: str
    note: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0
    zero: bool = True
    smooth: bool = False


FIGURES = (
    Figure(
        "Held-out accuracy",
        "One sample a problem at temperature 1, and greedy decoding.",
        "% of problems",
        (
            Curve("eval/accuracy", "sampled", "c1", markers=True),
            Curve("eval/greedy", "greedy", "c2", markers=True),
        ),
        scale=100,
    ),
    Figure(
        "Training reward",
        "Mean of the step's responses.",
        "reward",
        (Curve("reward/mean", "mean", "c1"),),
        smooth=True,
    ),
    Figure(
        "Response length",
        "End-of-sequence included.",
        "tokens",
        (Curve("response/length", "training", "c1"), Curve("eval/length", "held out", "c2", True)),
        zero=False,
        smooth=True,
    ),
    Figure(
        "Token entropy",
        "Percentiles over the step's response tokens.",
        "nats",
        (
            Curve("entropy/p95", "p95", "s3"),
            Curve("entropy/p80", "p80", "s2"),
            Curve("entropy/p50", "p50", "s1"),
            Curve("entropy/mean", "mean", "ink", dashed=True),
        ),
    ),
    Figure(
        "Entropy threshold",
        "Where kept tokens part from the others, and the mean entropy of the kept.",
        "nats",
        (
            Curve("entropy/kept_mean", "mean of kept", "c2"),
            Curve("entropy/threshold", "threshold", "c1"),
        ),
    ),
    Figure(
        "Kept tokens",
        "Share of the response tokens that the loss is taken over.",
        "% of tokens",
        (Curve("entropy/kept_fraction", "kept", "c1"),),
        scale=100,
    ),
    Figure(
        "Clipped tokens",
        "Share of the kept tokens whose ratio left the clip range.",
        "% of kept tokens",
        (Curve("clip/high", "high", "c1"), Curve("clip/low", "low", "c2")),
        scale=100,
        smooth=True,
    ),
    Figure(
        "Rows of the head",
        "All rows given to the head, and those that carry gradient in backward.",
        "rows a step",
        (Curve("head/rows", "all", "c2"), Curve("head/active_rows", "in backward", "c1")),
    ),
    Figure(
        "Time of a step",
        "Its parts: sampling, scoring by the old policy, update. Evaluation is not in it.",
        "seconds",
        (
            Curve("time/sample", "sample", "c1"),
            Curve("time/update", "update", "c2"),
            Curve("time/score", "score", "ink"),
        ),
        smooth=True,
    ),
    Figure(
        "LM head in the step",
        "Time in the head over the time of the whole step.",
        "% of step time",
        (Curve("head/share", "head", "c1"),),
        scale=100,
        smooth=True,
    ),
)


def draw(figure: Figure, rows: Sequence[Row]) -> dict[str, Any]:
    """The figure's title, note and SVG; without values the SVG is None and `missing` says why."""
    rows = [_with_share(row) for row in rows]
    lines = []
    for curve in figure.curves:
        found = points(rows, curve.key, figure.scale)
        window = 2 * (len(found) // 40) + 1 if figure.smooth and not curve.markers else 1
        if any(y is not None for _, y in found):
            lines.append(Line(curve.label, found, curve.color, curve.dashed, curve.markers, window))
    window = max((line.window for line in lines), default=1)
    note = figure.note + (f" Bold: mean over {window} steps." if window > 1 else "")
    missing = " or ".join(curve.key for curve in figure.curves)
    svg = Markup(plot(lines, figure.unit, figure.zero)) if lines else None
    return {"title": figure.title, "note": note, "svg": svg, "missing": missing}


def points(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value * scale) of every row that has `key`; None where it was not finite."""
    return [
        (row["step"], None if row[key] is None else row[key] * scale) for row in rows if key in row
    ]


def _with_share(row: Row) -> Row:
    """The row and "head/share", the head's part of the step's time."""
    head, step = row.get("time/head"), row.get("time/step")
    return row if head is None or not step else {**row, "head/share": head / step}
