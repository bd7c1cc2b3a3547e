"""The results of a comparison: one JSON file from the folders of its runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.log import provenance, read_rows, read_run, replace_text
from trainer.studies.compare.driver import is_finished

EVALUATION = {
    "accuracy": "eval/accuracy",
    "low": "eval/low",
    "high": "eval/high",
    "greedy": "eval/greedy",
    "length": "eval/length",
    "problems": "eval/problems",
}
TRAINING = {
    "reward": "reward/mean",
    "entropy": "entropy/mean",
    "length": "response/length",
    "rows": "head/active_rows",
    "all_rows": "head/rows",
    "below": "entropy/below_0.01",
    "p80": "entropy/p80",
}

Row = Mapping[str, Any]


def collect(label: str, configs: Sequence[Config], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results of those of `configs` that are finished.

    "runs" has for each

    - "task" (`label`), "arm", "seed", the "commits" of its starts and whether any was "dirty", and
      "seconds" of its steps and evaluations;
    - "evaluations", columns over "step": accuracy with its 95% interval "low", "high" and length of
      sampled responses, greedy accuracy, and the number of "problems";
    - "training", columns over "step": mean reward, mean entropy, its share below 0.01 and 80th
      percentile (nats), length;
    - in "training" also "rows" of the head's backward, and "all_rows", the response tokens of the
      same updates;
    - "rows", their sum.

    What a branch has of the run that it began at is its evaluation there, and neither time nor
    rows.

    Both kinds of rows are 0 in a step without update. Other columns are null where a step has not
    measured them.
    """
    branch = settings.get("branch", "")
    runs = [_run(label, config) for config in configs if is_finished(config, branch)]
    return {"made": provenance(""), "settings": dict(settings), "runs": runs}


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Put `results` at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(results, indent=1) + "\n")


def _run(label: str, config: Config) -> dict[str, Any]:
    folder = Path(config.root) / config.name
    rows = read_rows(folder / "metrics.jsonl")
    run = read_run(folder)
    starts, origin = run["starts"], run.get("origin")
    begun = origin["step"] if origin else 0
    own = [row for row in rows if row["step"] > begun or not origin]
    training = _columns([row for row in own if row["step"]], TRAINING)
    for name in ("rows", "all_rows"):
        training[name] = [value or 0.0 for value in training[name]]
    evaluated = [row for row in rows if EVALUATION["accuracy"] in row]
    before = sum(row["step"] <= begun for row in evaluated)
    evaluations = _columns(evaluated[max(before - 1, 0) :], EVALUATION)
    seconds = sum(row.get(f"time/{what}") or 0.0 for row in own for what in ("step", "evaluate"))
    return {
        "task": label,
        "arm": config.name.split("/")[-2],
        "seed": config.seed,
        "commits": list(dict.fromkeys(start["commit"] for start in starts)),
        "dirty": any(start["dirty"] for start in starts),
        "seconds": round(seconds, 1),
        "evaluations": evaluations,
        "training": training,
        "rows": sum(training["rows"]),
    }


def _columns(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"step": [row["step"] for row in rows]}
    for name, metric in names.items():
        columns[name] = [_short(row.get(metric)) for row in rows]
    return columns


def _short(value: float | None) -> float | None:
    """Six digits: the file is read by people too."""
    return None if value is None else float(f"{value:.6g}")
