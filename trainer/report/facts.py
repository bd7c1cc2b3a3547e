"""What a run's page says in words and numbers: what was run, how it went, and every metric."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trainer.config import sources
from trainer.config.changes import recorded
from trainer.report.curves import Columns
from trainer.report.progress import evaluated
from trainer.report.skips import KINDS, Skips, advice, plain
from trainer.report.standing import passed

TABLE = 400  # Rows of the table of metrics at most.

Row = Mapping[str, Any]


def notices(rows: Sequence[Row], skips: Skips) -> list[list[str]]:
    """What a reader must know first; each a paragraph, its first line in bold."""
    found = []
    if headline := skips.headline():
        found.append([headline, _composition(rows), *advice(_last(rows))])
    count = _total(rows, "response/count")
    for name, what in (("timeouts", "timed out"), ("crashes", "failed")):
        if failed := _total(rows, f"reward/{name}"):
            of = f"{failed:,.0f} of {count:,.0f}" if count else f"{failed:,.0f}"
            found.append([f"The verifier {what} on {of} responses, which therefore scored 0."])
    if lost := _total(rows, "log/nonfinite"):
        were = "s were" if lost > 1 else " was"
        found.append([f"{lost:,.0f} logged value{were} not finite; the curves have gaps there."])
    return found


def facts(run: Mapping[str, Any], rows: Sequence[Row], skips: Skips) -> list[tuple[str, str]]:
    """The header: what was run, on what, from which code."""
    config, last = run["config"], run["starts"][-1]
    algorithm, rollout, optimizer = config["algorithm"], config["rollout"], config["optimizer"]
    tokens = "all tokens"
    if algorithm["fraction"] < 1:
        kept = f"{algorithm['which']} {algorithm['fraction']:.0%} of tokens"
        tokens = f"{kept} by {sources(recorded(config)).entropy_source} entropy"
    began = datetime.fromisoformat(run["starts"][0]["time"])
    seconds = _total(rows, "time/step") + _total(rows, "time/evaluate")
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = dict.fromkeys(
        start["commit"][:10] + (" + edits" if start["dirty"] else "") for start in run["starts"]
    )
    truncations = {
        "Sampling": recorded(config).rollout.truncation,
        "Evaluation": recorded(config).eval.truncation,
    }
    starts = f", in {len(run['starts'])} starts" if len(run["starts"]) > 1 else ""
    return [
        ("Model", f"{config['model']['path']}, {config['model']['dtype']}"),
        ("Task", config["data"]["task"]),
        ("Objective", f"{algorithm['loss_type']}, {tokens}"),
        ("Batch", f"{rollout['prompts']} prompts, {rollout['group_size']} responses each"),
        *((name, str(one)) for name, one in truncations.items() if not one.off),
        ("Steps", f"{rows[-1]['step']:,} of {config['steps']:,}, seed {config['seed']}"),
        (
            "Updates",
            f"{optimizer['mini_batches']} per step, learning rate {optimizer['learning_rate']:g}",
        ),
        ("Skipped steps", _skipped(skips)),
        ("Time", f"{passed(seconds)}{starts}, from {began:%Y-%m-%d %H:%M} UTC"),
        ("Code", ", then ".join(commits)),
        ("Versions", versions),
        ("Machine", ", ".join(text for text in (last["device"], last["platform"]) if text)),
    ]


def tiles(rows: Sequence[Row], columns: Columns) -> list[dict[str, str]]:
    """The headline numbers."""
    names = list(evaluated(columns))[:4]
    return [
        _accuracy("Held-out accuracy", rows, "eval/accuracy", "eval/"),
        _accuracy("Held-out accuracy, greedy", rows, "eval/greedy", "eval/", "greedy_"),
        *(_accuracy(f"Accuracy on {n}", rows, f"eval/{n}.accuracy", f"eval/{n}.") for n in names),
        _share("Time in the LM head", rows, "time/head", "time/step", "of step time"),
        _share("Rows in backward", rows, "head/active_rows", "head/rows", "of head rows"),
    ]


def table(columns: Columns) -> list[tuple[str, ...]]:
    """Every metric: name, first, last, least and greatest value, and how many were not finite."""
    found = []
    for key in sorted(columns)[:TABLE]:
        values = [y for _, y in columns[key] if y is not None]
        lost = len(columns[key]) - len(values)
        shown = (values[0], values[-1], min(values), max(values)) if values else ()
        cells = [f"{value:.5g}" for value in shown] or [""] * 4
        found.append((key, *cells, f"{lost:,}" if lost else ""))
    return found


def _skipped(skips: Skips) -> str:
    several = len(skips.why) > 1
    why = ", ".join(
        plain(name) + (f" {count:,}" if several else "") for name, count in skips.why.most_common()
    )
    return f"{skips.skipped:,} of {skips.steps:,}" + (f": {why}" if why else "")


def _last(rows: Sequence[Row]) -> Row:
    """The last training step; none where there is an evaluation alone."""
    return next((row for row in reversed(rows) if row["step"]), {})


def _composition(rows: Sequence[Row]) -> str:
    """The kinds of all responses that were sampled, and of all groups."""
    total = _total(rows, "response/count")
    parts = []
    if total:
        shares = [
            (sum((row.get(f"kind/{k}") or 0) * (row.get("response/count") or 0) for row in rows), k)
            for k in KINDS
        ]
        told = ", ".join(f"{count / total:.1%} {kind}" for count, kind in shares if count)
        parts.append(f"Of {total:,.0f} responses: {told}.")
    if groups := _total(rows, "groups/sampled"):
        kinds = ("useful", "all_right", "all_wrong")
        told = ", ".join(
            f"{_total(rows, f'groups/{kind}'):,.0f} {kind.replace('_', ' ')}" for kind in kinds
        )
        parts.append(f"Of {groups:,.0f} groups: {told}.")
    return " ".join(parts)


def _accuracy(
    title: str, rows: Sequence[Row], key: str, prefix: str, kind: str = ""
) -> dict[str, str]:
    """The last value with its interval and number of problems, and how it has changed.

    The interval is the one that was logged beside it: one is not made up where the number of
    problems is unknown.
    """
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return {"title": title, "value": "n/a", "unit": "", "note": f"no value of {key}"}
    first, last = known[0], known[-1]
    low, high = last.get(f"{prefix}{kind}low"), last.get(f"{prefix}{kind}high")
    interval = "" if low is None or high is None else f"{low:.1%} to {high:.1%}"
    count = last.get(f"{prefix}problems")
    problems = (
        "number of problems unknown"
        if count is None
        else f"{count:,.0f} problem{'s' * (count != 1)}"
    )
    notes = [problems + (", 95% interval" if interval else "")]
    if first is not last:
        notes.append(_change(first, last, key, prefix + kind))
    else:
        notes.append(f"at step {last['step']:,}")
    return {"title": title, "value": f"{last[key]:.1%}", "unit": interval, "note": "; ".join(notes)}


def _change(first: Row, last: Row, key: str, prefix: str) -> str:
    """The difference in points, with an interval where both values have one.

    By the ends of both (MOVER: Zou and Donner 2008), as of independent shares; on the same
    problems the true interval is rather shorter.
    """
    points = round(100 * (last[key] - first[key]), 1) + 0.0  # no "-0.0"
    where = f"{first[key]:.1%} at step {first['step']:,}, {last[key]:.1%} at step {last['step']:,}"
    ends = [row.get(f"{prefix}{end}") for row in (first, last) for end in ("low", "high")]
    if None in ends:
        return f"{where}: {points:+.1f} points"
    below = 100 * math.hypot(last[key] - ends[2], ends[1] - first[key])
    above = 100 * math.hypot(ends[3] - last[key], first[key] - ends[0])
    return f"{where}: {points:+.1f} points ({points - below:+.1f} to {points + above:+.1f})"


def _share(title: str, rows: Sequence[Row], part: str, whole: str, of: str) -> dict[str, str]:
    """The sum of one metric over the sum of another, where a row has both."""
    both = [row for row in rows if row.get(part) is not None and row.get(whole)]
    if not both:
        note = f"no {part} and {whole} were logged"
        return {"title": title, "value": "n/a", "unit": "", "note": note}
    parts, wholes = sum(row[part] for row in both), sum(row[whole] for row in both)
    seconds = " s" if part.startswith("time/") else ""
    counts = f"{parts:,.0f}{seconds} of {wholes:,.0f}{seconds}"
    return {"title": title, "value": f"{parts / wholes:.1%}", "unit": of, "note": counts}


def _total(rows: Sequence[Row], key: str) -> float:
    return sum(row.get(key) or 0.0 for row in rows)
