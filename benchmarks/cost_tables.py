"""Tables and figures of the growth of cost."""

import math
from statistics import linear_regression

from benchmarks.tables import DTYPES, Run, about, cell, named, processor_of, quantile, table
from trainer.report.charts import Mark, Panel, Series

SWEEPS = {"tokens": "tokens", "vocabulary": "vocabulary", "fraction": "fraction of tokens"}
CLOCKS = ("wall_s", "cpu_s")
# Whose points there are, and how a row begins.
WHO = {"ours": "", "trl": "TRL's head: ", "lce": "torch's linear_cross_entropy, no entropies: "}
# (value, p20, p50, p80)
Points = list[tuple[float, float, float, float]]


def cost_in_short(runs: list[Run]) -> str:
    """Exponents of the fits, and how far the fractions are from a straight line."""
    rows = [
        _growth(runs, sweep, who)
        for who in WHO
        for sweep in SWEEPS
        if cost_points(runs[0], sweep, who=who)
    ]
    return table(["growth of the time of a step", *(DTYPES[run["dtype"]] for run in runs)], rows)


def _growth(runs: list[Run], sweep: str, who: str) -> list[str]:
    """One row: the exponent, or how far the fractions are from a straight line."""
    values = sorted(point[0] for point in cost_points(runs[0], sweep, who=who))
    row = [f"{WHO[who]}{SWEEPS[sweep]}, {values[0]:,g} to {values[-1]:,g}"]
    for run in runs:
        wall, cpu = (cost_points(run, sweep, clock, who) for clock in CLOCKS)
        if len(wall) < 2:
            row.append("")
        elif sweep == "fraction" and who == "ours":
            row.append(f"straight within {deviation(wall):.0%} (CPU {deviation(cpu):.0%})")
        elif sweep == "fraction":
            (_, _, first, _), *_, (_, _, last, _) = sorted(wall)
            row.append(f"{last / first:.2f} times from the first to the last")
        else:
            row.append(f"exponent {exponent(wall):.2f} (CPU {exponent(cpu):.2f})")
    return row


def cost_tables(runs: list[Run]) -> str:
    """Seconds of all points, and the fits."""
    rows = []
    for entry in runs[0]["contestants"]:
        same = [named(run, entry["name"]) for run in runs]
        row = [entry["label"], cell(entry.get("units"))]
        for other in same:
            row += [cell(quantile(other[c], 0.5), 3) if c in other else "" for c in CLOCKS]
        rows.append(row)
    columns = [f"{DTYPES[run['dtype']]} {what} s" for run in runs for what in ("wall", "CPU")]
    parts = ["**Growth of cost**", table(["", "units", *columns], rows), cost_in_short(runs)]
    return "\n\n".join([*parts, "\n".join(about(run) for run in runs)])


def cost_points(run: Run, sweep: str, clock: str = "wall_s", who: str = "ours") -> Points:
    """(value, p20, p50, p80) of one sweep of ours or of another's head."""
    return [
        (entry["value"], *(quantile(entry[clock], q) for q in (0.2, 0.5, 0.8)))
        for entry in run["contestants"]
        if clock in entry and entry["sweep"] == sweep and entry.get("who", "ours") == who
    ]


def cost_panels(runs: list[Run]) -> list[Panel]:
    """How cost grows on one make: a panel per sweep, a line per dtype."""
    panels = []
    make = processor_of(runs[0]).make
    for sweep, label in SWEEPS.items():
        lines = []
        for color, run in enumerate(runs):
            points = cost_points(run, sweep)
            name = DTYPES[run["dtype"]]
            label_of_line = name if sweep == "fraction" else f"{name}, slope {exponent(points):.2f}"
            marks = [Mark(x, y, low, high) for x, low, y, high in sorted(points)]
            lines.append(Series(label_of_line, marks, color, dots=True))
        log = sweep != "fraction"
        panels.append(Panel(make, label, lines, log, log, zero=not log, unit="seconds of a step"))
    return panels


def exponent(points: Points) -> float:
    """b of the least-squares fit time = a * value^b, in logarithms, of the medians."""
    logs = [(math.log(x), math.log(y)) for x, _, y, _ in points]
    return linear_regression(*zip(*logs, strict=True)).slope


def deviation(points: Points) -> float:
    """The largest relative distance of a median from the least-squares line through all."""
    slope, start = linear_regression(*zip(*((x, y) for x, _, y, _ in points), strict=True))
    return max(abs(y / (start + slope * x) - 1) for x, _, y, _ in points)
