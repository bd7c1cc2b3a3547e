"""Findings that docs/paper.md adds to the paper: the fraction that is enough, a mask's life."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks.paper_results import (
    DECISION,
    LABELS,
    NOTHING,
    WHERE,
    Found,
    image,
    read,
    share_above,
)
from benchmarks.tables import table
from trainer.report.charts import Panel, Series, figure
from trainer.studies.compare import report
from trainer.studies.compare.arms import ARMS
from trainer.studies.compare.differences import Interval, differences, interval

TOPS = tuple(
    sorted((a for a in ARMS if a.startswith("top-") and a[4:].isdigit()), key=lambda a: int(a[4:]))
)
"""The arms of the top tokens alone, the fewest first."""
FRACTIONS_FIGURE = "fractions.svg"


class _Task(NamedTuple):
    """The accuracies of all fractions on a task."""

    label: str
    decisions: float
    """Share of the tokens above DECISION, before RL."""
    comparison: Found


def fractions(results: Path) -> str:
    """Accuracy of each fraction less that of all tokens, beside the share of decisions."""
    rows = []
    for task in _tasks(results):
        cells = dict.fromkeys(TOPS, "")
        pairs = [(arm, "all") for arm in TOPS if len(_shared(task, arm)) > 1]
        values = {arm: report.final(task.comparison, arm) for arm in (*TOPS, "all")}
        for one in differences(values, pairs):
            cells[one.arm] = report.points(one.interval)
        rows.append([task.label, f"{task.decisions:.1%}", *cells.values()])
    if not rows:
        return NOTHING
    columns = ["task", f"above {DECISION} nats", *(f"top {arm[4:]}%" for arm in TOPS)]
    return "\n\n".join(
        [
            table(columns, rows),
            image(FRACTIONS_FIGURE, "Gain by the share of the decisions that is trained on"),
            f"Data: `{WHERE}/*-comparison.json`, `{WHERE}/*-patterns-seed-*.json`.",
        ]
    )


def draw_fractions(results: Path) -> str | None:
    """Share of the gain of all tokens, by the fraction over the share of decisions, as an SVG."""
    lines, sources = [], []
    for color, task in enumerate(_tasks(results)):
        marks = [
            report.mark(int(arm[4:]) / 100 / task.decisions, _gain(task, arm))
            for arm in TOPS
            if _shared(task, arm)
        ]
        if marks:
            lines.append(Series(task.label, marks, color))
            sources.append(f"{WHERE}/{task.label}-comparison.json")
    if not lines:
        return None
    panel = Panel(
        "accuracy gained / gained by all tokens",
        "fraction trained on / share of decisions",
        lines,
        log_x=True,
        lines=[1.0],
    )
    return figure([panel], ", ".join(sources))


def masks(results: Path) -> str:
    """How long a mask stays right, by the distance of the policies that made and use it."""
    rows = []
    for label in LABELS:
        for arm in ("top-20", "all"):
            found = read(results, f"{label}-evolution-{arm}-seed-*.json")
            if not found:
                continue
            last = len(found[0]["names"]) - 1
            rows.append(
                [
                    f"{label}, {arm}",
                    *(
                        report.percent(interval([fmean(_lagged(one, lag)) for one in found]))
                        for lag in range(1, last + 1)
                    ),
                    report.percent(interval([one["correlation"][-1] for one in found])),
                ]
            )
    if not rows:
        return NOTHING
    columns = ["mask that is older by", "20 steps", "40 steps", "60 steps", "rank correlation"]
    return table(columns, rows) + f"\n\nData: `{WHERE}/*-evolution-*.json`."


def _tasks(results: Path) -> Iterator[_Task]:
    """Those with runs and patterns."""
    for label in LABELS:
        shapes = read(results, f"{label}-patterns-seed-*.json")
        for comparison in read(results, f"{label}-comparison.json"):
            if shapes:
                share = fmean(share_above(DECISION, one) for one in shapes)
                yield _Task(label, share, comparison)


def _shared(task: _Task, arm: str) -> set[int]:
    """Seeds of `arm` that "all" has too."""
    return report.final(task.comparison, arm).keys() & report.final(task.comparison, "all").keys()


def _gain(task: _Task, arm: str) -> Interval:
    """What `arm` gained in accuracy over what "all" gained, over seeds."""
    before = report.final(task.comparison, "all", 0)
    after, every = (report.final(task.comparison, name) for name in (arm, "all"))
    shared = sorted(_shared(task, arm))
    return interval([(after[s] - before[s]) / (every[s] - before[s]) for s in shared])


def _lagged(one: Found, lag: int) -> list[float]:
    """Share of each checkpoint's top that the one `lag` before it catches."""
    overlap = one["overlap"]
    return [overlap[c - lag][c] for c in range(lag, len(overlap))]
