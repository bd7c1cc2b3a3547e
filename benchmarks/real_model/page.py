"""The tables and figures on a pretrained model, from benchmarks/results/real_model/ alone."""

import json
from pathlib import Path

from benchmarks.paper_results import NOTHING, Found, image
from benchmarks.real_model.kept import FOLDER
from benchmarks.real_model.studies import EVOLVED
from benchmarks.tables import table
from trainer.report.charts import Mark, Panel, Series, figure
from trainer.studies.analyze import evolution as evolving
from trainer.studies.analyze import temperatures as tempering
from trainer.studies.compare import report
from trainer.studies.compare.arms import Study

# Which of the studies of `trainer compare` have the arms.
STUDIES: tuple[Study, ...] = ("ablation", "rules")
ROWS = 16


def found(results: Path, name: str) -> Found | None:
    """A result file's contents; None where it was not measured."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def patterns(results: Path) -> str:
    """Shape of the entropies of each kind of text, and tokens of all kinds by mean entropy."""
    if (all_kinds := found(results, "patterns")) is None:
        return NOTHING
    rows = [_row("all kinds", all_kinds)]
    rows += [_row(kind, one) for kind, one in all_kinds["kinds"].items()]
    columns = ["answers to", "tokens", "mean, nats", "below 0.01", "median", "80th percentile"]
    tokens = [
        [*_token(high), *_token(low)]
        for high, low in zip(all_kinds["highest"][:ROWS], all_kinds["lowest"], strict=False)
    ]
    of_tokens = ["highest", "mean, nats", "of all", "lowest", "mean, nats", "of all"]
    words = [
        [word["text"], f"{word['count']:,}", f"{word['mean']:.3f}", f"{word['lower']:.1%}"]
        for word in all_kinds["forking"]
        if word["count"]
    ]
    absent = [word["text"] for word in all_kinds["forking"] if not word["count"]]
    of_words = ["the paper's word", "count", "mean, nats", "tokens with a lower mean"]
    return "\n\n".join(
        [
            table(columns, rows),
            image("pretrained-patterns.svg", "Entropies of a pretrained model"),
            table(of_tokens, tokens),
            table(of_words, words),
            *([f"Not sampled: {', '.join(absent)}."] if absent else []),
            _data("patterns"),
        ]
    )


def _row(name: str, one: Found) -> list[str]:
    percentiles = one.get("percentiles")
    shares = [f"{percentiles[p]:.3f}" for p in ("50", "80")] if percentiles else ["", ""]
    numbers = f"{one['count']:,}", f"{one['mean']:.3f}", f"{one['below_0.01']:.1%}"
    return [name, *numbers, *shares]


def _token(token: Found) -> tuple[str, str, str]:
    text = json.dumps(token["text"], ensure_ascii=False)[1:-1].replace("|", "\\|")
    return f"`{text}`", f"{token['mean']:.3f}", f"{token['share']:.2%}"


def learning(results: Path) -> str:
    """Arms, their differences and curves."""
    if (runs := found(results, "learning")) is None:
        return NOTHING
    parts = []
    for study in STUDIES:
        parts += [report.arm_table(runs, study), report.difference_table(runs, study)]
        parts.append(image(f"pretrained-{study}.svg", "RL of a pretrained model"))
    minutes = _minutes(runs["runs"])
    parts.append(f"Minutes of a run by the clock, on one core: {minutes}.")
    hours = sum(run["seconds"] for run in runs["runs"]) / 3600
    commits = sorted({commit[:10] for run in runs["runs"] for commit in run["commits"]})
    more = f"; commits {', '.join(commits)}; {len(runs['runs'])} runs, "
    more += f"{hours:.1f} hours by the clock in sum"
    return "\n\n".join([*parts, _data("learning", more)])


def _minutes(runs: list[Found]) -> str:
    """The mean of each arm's steps and evaluations, by arm."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        seconds.setdefault(report.NAMES.get(run["arm"], run["arm"]), []).append(run["seconds"])
    return ", ".join(f"{arm} {sum(s) / len(s) / 60:.1f}" for arm, s in seconds.items())


def temperatures(results: Path) -> str:
    """Accuracy over both temperatures."""
    if (sweep := found(results, "temperatures")) is None:
        return NOTHING
    rows = []
    for point in sweep["points"]:
        accuracy = point["accuracy"]
        share = "{:.1%} [{:.1f}, {:.1f}]".format(
            accuracy["value"], 100 * accuracy["low"], 100 * accuracy["high"]
        )
        rows.append([f"{point['low']:g}", f"{point['high']:g}", share, f"{point['length']:.1f}"])
    threshold = f"The threshold is {sweep['threshold']:.3f} nats."
    columns = ["T_low", "T_high", "accuracy", "length"]
    figure_of = image("pretrained-temperatures.svg", "Two temperatures of a pretrained model")
    return "\n\n".join([threshold, table(columns, rows), figure_of, _data("temperatures")])


def overlap(results: Path) -> str:
    """The top 20% before and after RL, of the trained model's answers."""
    rows = []
    for arm in EVOLVED:
        if (one := found(results, f"evolution-{arm}")) is not None:
            means = [f"{mean:.3f}" for mean in one["mean"]]
            shares = [f"{one['overlap'][0][-1]:.1%}", f"{one['correlation'][-1]:.1%}"]
            below = [f"{share:.1%}" for share in one["below_0.01"]]
            numbers = [*shares, *means, *below]
            rows.append([report.NAMES.get(arm, arm), f"{one['tokens']:,}", *numbers])
    if not rows:
        return NOTHING
    columns = ["arm", "tokens", "top 20% in both", "rank correlation"]
    columns += ["mean entropy before", "after", "below 0.01 before", "after"]
    drawn = image("pretrained-evolution.svg", "Entropies before and after RL on the top 20%")
    return f"{table(columns, rows)}\n\n{drawn}\n\n{_data('evolution-*')}"


def figures(results: Path) -> dict[str, str]:
    """The text of every figure, by file name."""
    drawn = {}
    if (all_kinds := found(results, "patterns")) is not None:
        drawn["pretrained-patterns.svg"] = _draw(all_kinds)
    if (runs := found(results, "learning")) is not None:
        for study in STUDIES:
            drawn[f"pretrained-{study}.svg"] = report.curves(runs, study, _path("learning"))
    if (sweep := found(results, "temperatures")) is not None:
        drawn["pretrained-temperatures.svg"] = tempering.draw(sweep, _path("temperatures"))
    if (one := found(results, "evolution-top-20")) is not None:
        drawn["pretrained-evolution.svg"] = evolving.draw(one, _path("evolution-top-20"))
    return drawn


def _draw(all_kinds: Found) -> str:
    """The distribution function of the entropies of each kind."""
    series = [
        Series(
            kind,
            [Mark(x, y, y, y) for x, y in zip(cdf["points"], cdf["shares"], strict=True)],
            number,
        )
        for number, (kind, cdf) in enumerate(all_kinds["cdfs"].items())
    ]
    panel = Panel("share of tokens below", "entropy, nats", series, log_x=True, zero=True)
    return figure([panel], _path("patterns"))


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _data(name: str, more: str = "") -> str:
    return f"Data: `{_path(name)}`{more}."
