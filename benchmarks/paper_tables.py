"""Tables and figures of docs/paper.md, from the files in benchmarks/results/paper/ alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks import paper_findings as findings
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
from trainer.studies.analyze import evolution as evolving
from trainer.studies.analyze import patterns as patterning
from trainer.studies.analyze import temperatures as tempering
from trainer.studies.compare import report
from trainer.studies.compare.arms import STUDIES, Study
from trainer.studies.compare.differences import interval

# The paper's, of Qwen3-8B on AIME 2024 and 2025 (section 3), and of Qwen3-14B (Table 1).
PAPER_BELOW, PAPER_P80 = 0.5064, 0.672
PAPER_OVERLAP = 0.8667


def patterns(results: Path) -> str:
    """Shape of the entropies before RL, and the tokens with the highest and lowest."""
    rows = [["paper, Qwen3-8B", "", "", f"{PAPER_BELOW:.1%}", f"{PAPER_P80}", "", "", ""]]
    parts = []
    for label in LABELS:
        found = read(results, f"{label}-patterns-seed-*.json")
        if not found:
            continue
        asked = found[0]["settings"]["problems"]
        rows.append(
            [
                f"{label}, {len(found)} models",
                f"{sum(one['count'] for one in found):,}",
                _mean([one["mean"] for one in found], 3),
                report.percent(interval([one["below_0.01"] for one in found])),
                _mean([one["percentiles"]["80"] for one in found], 3),
                report.percent(interval([share_above(DECISION, one) for one in found])),
                report.accuracy(interval([one["accuracy"] for one in found]), asked),
                f"{asked:,}",
            ]
        )
        parts.append(_tokens(label, found[0]))
        parts.append(image(f"{label}-patterns.svg", f"Entropies on {label}"))
        parts.append(f"Data: `{WHERE}/{label}-patterns-seed-*.json`; drawn and listed: the first.")
    if not parts:
        return NOTHING
    columns = ["model", "tokens", "mean, nats", "below 0.01", "80th percentile"]
    columns += [f"above {DECISION}", "accuracy", "problems"]
    return "\n\n".join([table(columns, rows), *parts])


def temperatures(results: Path) -> str:
    """Accuracy over both temperatures, by task."""
    parts = []
    for label in LABELS:
        found = read(results, f"{label}-temperatures-seed-*.json")
        if not found:
            continue
        asked = found[0]["settings"]["problems"]
        pairs = [(point["low"], point["high"]) for point in found[0]["points"]]
        rows = []
        for low, high in pairs:
            points = [
                point
                for one in found
                for point in one["points"]
                if (point["low"], point["high"]) == (low, high)
            ]
            accuracy = interval([point["accuracy"]["value"] for point in points])
            length = fmean(point["length"] for point in points)
            share = report.accuracy(accuracy, asked)
            rows.append([f"{low:g}", f"{high:g}", share, f"{length:.1f}"])
        sample = f"{len(found)} models, {asked:,} problems"
        columns = ["T_low", "T_high", f"accuracy, {label}, {sample}", "length"]
        parts.append(table(columns, rows))
        parts.append(image(f"{label}-temperatures.svg", f"Accuracy on {label}"))
        parts.append(
            f"Data: `{WHERE}/{label}-temperatures-seed-*.json`; drawn: the first, with intervals "
            "over problems."
        )
    return "\n\n".join(parts) or NOTHING


def evolution(results: Path) -> str:
    """Overlap of the top tokens over training, by task and arm."""
    rows, parts = [], []
    for label in LABELS:
        for arm in ("top-20", "all"):
            found = read(results, f"{label}-evolution-{arm}-seed-*.json")
            if not found:
                continue
            shares = [
                report.percent(interval([one["overlap"][0][c] for one in found]))
                for c in range(len(found[0]["names"]))
            ]
            rows.append([f"{label}, {arm}, {len(found)} models", *shares])
        if read(results, f"{label}-evolution-top-20-seed-*.json"):
            parts.append(image(f"{label}-evolution.svg", f"Evolution on {label}"))
            parts.append(
                f"Data: `{WHERE}/{label}-evolution-*-seed-*.json`; drawn: top-20, the first seed."
            )
    if not rows:
        return NOTHING
    columns = ["top 20% of the base also in that of step", "0", "20", "40", "60"]
    paper = ["paper, Qwen3-14B, step 1360", "100%", "", "", f"{PAPER_OVERLAP:.1%}"]
    return "\n\n".join([table(columns, [paper, *rows]), *parts])


# Studies whose results are in a file of their own.
FILES: Mapping[Study, str] = {"rules": "rules"}


def comparison(study: Study, results: Path) -> str:
    """Arms, their differences and curves, by task."""
    parts = []
    for label in LABELS:
        path = results / f"{label}-{FILES.get(study, 'comparison')}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        runs = [run for run in found["runs"] if run["arm"] in STUDIES[study]]
        seeds = sorted({run["seed"] for run in runs})
        commits = sorted({commit[:10] for run in runs for commit in run["commits"]})
        hours = sum(run["seconds"] for run in runs) / 3600
        parts += [
            f"**{label}**",
            report.arm_table(found, study),
            report.difference_table(found, study),
            image(f"{label}-{study}.svg", f"The {study} on {label}"),
            f"Data: `{WHERE}/{path.name}`; seeds {', '.join(map(str, seeds))}; commits "
            f"{', '.join(commits)}; {len(runs)} runs, whose steps and evaluations took {hours:.1f} "
            "hours by the clock in sum.",
        ]
    return "\n\n".join(parts) or NOTHING


ablation = partial(comparison, "ablation")
algorithms = partial(comparison, "algorithms")
rules = partial(comparison, "rules")


def figures(results: Path) -> dict[str, str]:
    """The text of every figure, by file name; each names its data in its description."""
    drawn: dict[str, str] = {}
    kinds: Sequence[tuple[str, str, Callable[[Found, str], str]]] = (
        ("patterns", "patterns", patterning.draw),
        ("temperatures", "temperatures", tempering.draw),
        ("evolution", "evolution-top-20", evolving.draw),
    )
    for label in LABELS:
        for kind, middle, draw in kinds:
            for path in sorted(results.glob(f"{label}-{middle}-seed-*.json"))[:1]:
                found = json.loads(path.read_text())
                drawn[f"{label}-{kind}.svg"] = draw(found, f"{WHERE}/{path.name}")
        for study in STUDIES:
            path = results / f"{label}-{FILES.get(study, 'comparison')}.json"
            if path.exists():
                found = json.loads(path.read_text())
                source = f"{WHERE}/{path.name}"
                drawn[f"{label}-{study}.svg"] = report.curves(found, study, source)
    if gains := findings.draw_fractions(results):
        drawn[findings.FRACTIONS_FIGURE] = gains
    return drawn


def _tokens(label: str, found: Found, count: int = 8) -> str:
    rows = []
    for high, low in zip(found["tokens"][:count], found["tokens"][::-1], strict=False):
        rows.append(
            [
                f"`{high['text']}`",
                f"{high['mean']:.3f}",
                f"{high['share']:.1%}",
                f"`{low['text']}`",
                f"{low['mean']:.3f}",
                f"{low['share']:.1%}",
            ]
        )
    columns = [f"{label}: highest", "mean, nats", "of all", "lowest", "mean, nats", "of all"]
    return table(columns, rows)


def _mean(values: Sequence[float], digits: int) -> str:
    return report.plain(interval(values), digits)
