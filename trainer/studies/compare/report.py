"""What a comparison's results say: tables in Markdown and figures, from its JSON alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.estimates import wilson
from trainer.log import replace_text
from trainer.report.charts import Mark, Panel, Series, figure
from trainer.studies.compare.arms import STUDIES, Study
from trainer.studies.compare.differences import Difference, Interval, differences, interval

Results = Mapping[str, Any]
BASELINES: Mapping[Study, tuple[str, ...]] = {
    "ablation": ("top-20", "all"),
    "algorithms": ("top-20", "all"),
    "rules": ("top-20", "all", "random-20"),
}
"""What every other arm of a study is compared with."""
EMPHASIZED = ("top-20", "all", "random-20", "bottom-80", "ppo", "grpo")
WINDOW = 5
"""Steps that the curves of training are averaged over."""
NAMES = {"all": "all (DAPO)", "top-20": "top 20%", "ppo": "PPO-clip", "grpo": "GRPO"}


def write_files(results: Results, path: Path) -> list[Path]:
    """Write the tables and figures of `results`, a file at `path`, beside it; their paths."""
    written = []
    for study in STUDIES:
        if set(_arms(results, study)) - (set(BASELINES["rules"]) if study == "rules" else set()):
            page, svg = (path.with_name(f"{path.stem}-{study}{end}") for end in (".md", ".svg"))
            replace_text(
                page, f"{arm_table(results, study)}\n\n{difference_table(results, study)}\n"
            )
            replace_text(svg, curves(results, study, path.name))
            written += [page, svg]
    return written


def arm_table(results: Results, study: Study) -> str:
    """A row for each arm: means over seeds after the last step, with 95% intervals over seeds.

    Accuracy of sampled responses and greedy, each with Wilson's 95% interval over the problems in
    brackets. All seeds have the same problems, so it is that of the mean over seeds as if each
    problem were answered once. It is at least as long as the true one. Mean entropy, nats, and
    length, tokens, are over the last ten steps of training. Rows of the head's backward are over
    the whole run, and against "all".
    """
    lines = [
        "| arm | seeds | problems | accuracy before | accuracy | greedy | entropy | length "
        "| backward rows |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    everything = _values(results, "all", lambda run: run["rows"])
    for arm in _arms(results, study):
        after = interval(list(final(results, arm).values()))
        greedy = interval(list(final(results, arm, metric="greedy").values()))
        asked = problems(results, arm)
        cells = [
            f"{asked:,}",
            accuracy(interval(list(final(results, arm, 0).values())), asked, False),
            accuracy(after, asked),
            accuracy(greedy, asked),
            plain(interval(list(_values(results, arm, _last("entropy")).values())), 3),
            plain(interval(list(_values(results, arm, _last("length")).values())), 1),
            _rows(_values(results, arm, lambda run: run["rows"]), everything),
        ]
        lines.append(f"| {NAMES.get(arm, arm)} | {after.seeds} | {' | '.join(cells)} |")
    runs = [run for arm in _arms(results, study) for run in _runs(results, arm)]
    if idle := sum(not run["rows"] for run in runs):
        lines += [
            "",
            f"{idle} of {len(runs)} runs updated nothing: each of their steps was skipped.",
        ]
    return "\n".join(lines)


def found_differences(results: Results, study: Study) -> list[Difference]:
    """Differences of final accuracy between each arm and the baselines, over two seeds or more."""
    arms, bases = _arms(results, study), BASELINES[study]
    values = {arm: final(results, arm) for arm in arms}
    pairs = [
        (arm, base)
        for base in bases
        if base in arms
        for arm in arms
        if arm not in bases[: bases.index(base) + 1]
        and len(values[arm].keys() & values[base].keys()) > 1
    ]
    asked = [problems(results, arm) for arm in arms]
    return differences(values, pairs, 1 / min(asked) if asked else 0.0)


def difference_table(results: Results, study: Study) -> str:
    """Final accuracy of each arm less that of each of BASELINES, within seeds.

    The least number of problems of any arm stands below.
    """
    if not (found := found_differences(results, study)):
        return "No two arms have two seeds in common yet: no difference can be told."
    lines = [
        "| difference | points | p | p, Holm | p, sign flips | distinguishable |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for one in found:
        names = f"{NAMES.get(one.arm, one.arm)} - {NAMES.get(one.other, one.other)}"
        cells = [
            points(one.interval),
            *(f"{p:.3f}" if p >= 0.0005 else "< 0.001" for p in (one.p, one.p_holm)),
            f"{one.p_flips:.3f}",
            "**yes**" if one.distinguishable else "no",
        ]
        lines.append(f"| {names} | {' | '.join(cells)} |")
    asked = min(problems(results, arm) for arm in _arms(results, study))
    lines += ["", f"Intervals are over seeds, which share their {_count(asked)}."]
    return "\n".join(lines)


def curves(results: Results, study: Study, source: str) -> str:
    """Accuracy, entropy, length over training, and accuracy against backward rows, as an SVG."""
    arms = _arms(results, study)
    asked = min(problems(results, arm) for arm in arms)
    panels = [
        _curve(results, study, "evaluations", "accuracy", f"held-out accuracy, {_count(asked)}"),
        _curve(results, study, "training", "entropy", "mean entropy, nats"),
        _curve(results, study, "training", "length", "response length, tokens"),
    ]
    marks = []
    for arm in arms:
        rows = interval(list(_values(results, arm, lambda run: run["rows"]).values())).mean
        after = interval(list(final(results, arm).values()))
        at = [mark(max(rows, 1.0), after)]
        marks.append(Series(NAMES.get(arm, arm), at, _color(results, arm, study), joined=False))
    panels.append(
        Panel("final accuracy by backward rows paid", "rows of the head's backward", marks, True)
    )
    # Runs that never updated have measured no entropy.
    drawn = [p for p in panels if any(math.isfinite(m.y) for s in p.series for m in s.marks)]
    return figure(drawn, source)


def mark(x: float, found: Interval) -> Mark:
    """An interval in a figure; of one seed, the value alone."""
    low, high = (found.low, found.high) if found.seeds > 1 else (found.mean, found.mean)
    return Mark(x, found.mean, low, high)


def final(
    results: Results, arm: str, place: int = -1, metric: str = "accuracy"
) -> dict[int, float]:
    """`metric` of `arm` by seed, after its last step; in another evaluation by its `place`."""
    return _values(results, arm, lambda run: run["evaluations"][metric][place])


def problems(results: Results, arm: str) -> int:
    """How many held-out problems the accuracies of `arm` are of: the least of its runs.

    Results of earlier versions have what was asked for alone.
    """
    config = results.get("settings", {}).get("config", {})
    asked = config.get("eval_problems") or config.get("eval", {}).get("problems")
    found = [run["evaluations"].get("problems", [asked])[-1] for run in _runs(results, arm)]
    return int(min(found))


def _count(asked: int) -> str:
    return f"{asked:,} problem" + "s" * (asked != 1)


def accuracy(found: Interval, asked: int, half: bool = True) -> str:
    """A share of `asked` problems, with Wilson's interval over them in brackets."""
    around = wilson(found.mean, asked)
    return f"{percent(found, half)} [{100 * around.low:.1f}, {100 * around.high:.1f}]"


def percent(found: Interval, half: bool = True) -> str:
    """A share with its half width, in percent."""
    if not half or found.seeds < 2:
        return f"{found.mean:.1%}"
    return f"{100 * found.mean:.1f} ± {100 * (found.high - found.mean):.1f}%"


def plain(found: Interval, digits: int) -> str:
    """A number with its half width; a dash where a run has none."""
    if math.isnan(found.mean):
        return "-"
    if found.seeds < 2:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.high - found.mean:.{digits}f}"


def points(found: Interval) -> str:
    """A difference of shares with its half width, in percentage points."""
    return f"{100 * found.mean:+.1f} ± {100 * (found.high - found.mean):.1f}"


def _curve(results: Results, study: Study, part: str, name: str, title: str) -> Panel:
    series = []
    for arm in _arms(results, study):
        runs = [run[part] for run in _runs(results, arm)]
        steps = sorted(set.intersection(*(set(run["step"]) for run in runs)))
        marks = []
        for step in steps:
            values = [_around(run, name, step, part == "training") for run in runs]
            found = interval([value for value in values if value is not None] or [float("nan")])
            if len(runs) == 1 and name == "accuracy" and "low" in runs[0]:  # over problems
                place = runs[0]["step"].index(step)
                ends = runs[0]["low"][place], runs[0]["high"][place]
                marks.append(Mark(step, found.mean, *ends))
            else:
                marks.append(mark(step, found))
        style = "" if arm in EMPHASIZED else "thin"
        series.append(Series(NAMES.get(arm, arm), marks, _color(results, arm, study), style))
    return Panel(title, "RL step", series)


def _around(run: Mapping[str, Any], name: str, step: int, smooth: bool) -> float | None:
    """The value at `step`, or its mean over the steps up to it."""
    place = run["step"].index(step)
    first = max(place - WINDOW + 1, 0) if smooth else place
    values = [value for value in run[name][first : place + 1] if value is not None]
    return sum(values) / len(values) if values else None


def _color(results: Results, arm: str, study: Study) -> int:
    """The same in every figure of a study, whichever of its arms it has."""
    return _listed(results, study).index(arm)


def _runs(results: Results, arm: str) -> list[Mapping[str, Any]]:
    return [run for run in results["runs"] if run["arm"] == arm]


def _arms(results: Results, study: Study) -> list[str]:
    """The arms of the study that have runs."""
    return [arm for arm in _listed(results, study) if _runs(results, arm)]


def _listed(results: Results, study: Study) -> list[str]:
    """The arms of the study; the rules' have those of no study too, rules of the user's."""
    known = {arm for arms in STUDIES.values() for arm in arms}
    others = (run["arm"] for run in results["runs"] if run["arm"] not in known)
    return [*STUDIES[study], *(dict.fromkeys(others) if study == "rules" else ())]


def _values(results: Results, arm: str, value: Any) -> dict[int, float]:
    return {run["seed"]: value(run) for run in _runs(results, arm)}


def _last(name: str) -> Any:
    """Mean over the last ten steps that have it."""

    def value(run: Mapping[str, Any]) -> float:
        values = [v for v in run["training"][name] if v is not None][-10:]
        return sum(values) / len(values) if values else float("nan")

    return value


def _rows(mine: Mapping[int, float], everything: Mapping[int, float]) -> str:
    """Their mean, and what share of those of "all" they are, within seeds."""
    mean = sum(mine.values()) / len(mine)
    both = mine.keys() & everything.keys()
    if not both:
        return f"{mean:,.0f}"
    share = sum(mine[seed] / max(everything[seed], 1) for seed in both) / len(both)
    return f"{mean:,.0f} ({share:.0%})"
