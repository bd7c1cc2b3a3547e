"""The paper's measurements on two small tasks: entropy patterns, ablation, and all the rest.

python -m benchmarks.paper                  does what is missing, then writes docs/paper.md anew
python -m benchmarks.paper --hours 1        starts no run that would not end within an hour
python -m benchmarks.paper --rules          runs the rules of later papers instead; resumes too
python -m benchmarks.paper --render         docs/paper.md and its figures from the result files
python -m benchmarks.paper --check          fails where they are not what the result files say

Training runs go to runs/paper/TASK/ARM/seed-K by `python -m trainer compare`, the analyses of
their checkpoints to runs/paper/TASK/analyses by `python -m trainer analyze`; what they find to
benchmarks/results/paper/. Two processes of one thread each at a time. Stopped at any moment, the
same command goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import paper_page
from entropy_kernels._bench.result_text import result_text

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/paper")
RESULTS = Path("benchmarks/results/paper")
SEEDS = 5
STEPS = 60
JOBS = 2
# The arms whose checkpoints are compared over training, for every seed.
EVOLVED = ("top-20", "all")
SIZES = {
    "patterns": ("--problems", "1024", "--samples", "4"),
    "evolution": ("--problems", "512", "--samples", "2"),
    "temperatures": ("--problems", "512", "--samples", "1"),
}
TRAIN = {
    "root": str(RUNS),
    "steps": STEPS,
    "eval.problems": 512,
    "eval.every": 20,
    "checkpoint-every": 20,
    "keep-checkpoints": 4,
}


@dataclass(frozen=True)
class Task:
    """One of the two tasks."""

    label: str
    """The name in folders and files."""
    preset: str
    """The trainer's preset."""
    data: str
    """The value of `--data`."""
    max_new_tokens: int
    """The limit of a response, equal to the preset's."""

    @property
    def comparison(self) -> Path:
        """The file with the results of its training runs."""
        return RUNS / self.label / "comparison.json"

    @property
    def rules(self) -> Path:
        """The file with the results of the rules' arms."""
        return RUNS / self.label / "rules.json"


TASKS = (
    Task("ladder", "tiny", "ladder", 48),
    Task("ladder-long", "tiny-long", "ladder:long", 64),
)


@dataclass(frozen=True)
class Analysis:
    """One `python -m trainer analyze`, and the file its result is kept in."""

    kind: str
    name: str
    run: Path
    arguments: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder of everything that it writes."""
        return self.run.parents[1] / "analyses" / self.name

    @property
    def ready(self) -> bool:
        """Whether the run has ended."""
        return (self.run / "checkpoints" / f"step-{STEPS:06d}").exists()

    @property
    def file(self) -> Path:
        """The file with its result."""
        return self.folder / f"{self.kind}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--rules", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    status = 0
    if not (options.render or options.check):
        status = rules(options.hours) if options.rules else study(options.hours)
    return status or paper_page.write(ROOT, check=options.check)


def study(hours: float) -> int:
    """Train and analyse what is missing; 0 where all is done."""
    failed = [task.label for task in TASKS if _run(comparison(task, hours))]
    failed += analyse()
    keep()
    return int(bool(failed))


def rules(hours: float) -> int:
    """Train what is missing of the arms of rules; 0 where all is done."""
    failed = [task.label for task in TASKS if _run(rules_comparison(task, hours))]
    keep()
    return int(bool(failed))


def analyse() -> list[str]:
    """Do the analyses that are missing and whose runs have ended; the names of the others."""
    missing = [a for task in TASKS for a in analyses(task) if not a.file.exists()]
    ready = [analysis for analysis in missing if analysis.ready]
    with ThreadPoolExecutor(JOBS) as pool:
        done = list(pool.map(_analyse, ready))
    failed = [analysis.name for analysis, right in zip(ready, done, strict=True) if not right]
    left = [analysis.name for analysis in missing if not analysis.ready]
    for what, names in (("failed", failed), ("left, for want of their runs", left)):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return failed + left


def keep() -> None:
    """Write the results that exist to RESULTS, after all runs: a run notes a dirty checkout."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {task.comparison: RESULTS / f"{task.label}-comparison.json" for task in TASKS}
    found |= {task.rules: RESULTS / f"{task.label}-rules.json" for task in TASKS}
    found |= {a.file: RESULTS / f"{a.name}.json" for task in TASKS for a in analyses(task)}
    for source, target in found.items():
        if source.exists():
            target.write_text(result_text(json.loads(source.read_text())))


def comparison(task: Task, hours: float) -> list[str]:
    """The command of all training runs of `task`."""
    return _comparison(task, task.comparison, hours)


def rules_comparison(task: Task, hours: float) -> list[str]:
    """The command of the runs of the rules' arms: beside the others, so runs of both are shared."""
    return [*_comparison(task, task.rules, hours), "--studies", "rules"]


def _comparison(task: Task, out: Path, hours: float) -> list[str]:
    train = [part for name, value in TRAIN.items() for part in (f"--{name}", str(value))]
    return [
        *("compare", task.preset, "--label", task.label, "--seeds", str(SEEDS)),
        *("--jobs", str(JOBS), "--hours", str(hours), "--out", str(out), *train),
    ]


def analyses(task: Task) -> Iterator[Analysis]:
    """The analyses of the checkpoints of `task`: the base's patterns, and the trained models."""
    for seed in range(SEEDS):
        run = RUNS / task.label / "top-20" / f"seed-{seed}"
        base = run / "checkpoints" / "step-000000"
        yield _analysis("patterns", task, run, base)
        yield _analysis("temperatures", task, run, run)
        for arm in EVOLVED:
            run = RUNS / task.label / arm / f"seed-{seed}"
            yield _analysis("evolution", task, run, run)


def _analysis(kind: str, task: Task, run: Path, model: Path) -> Analysis:
    arm = run.parent.name
    name = "-".join((task.label, kind, *((arm,) if kind == "evolution" else ()), run.name))
    length = ("--max-new-tokens", str(task.max_new_tokens))
    options = ("--data", task.data, "--model", str(model), *length, *SIZES[kind])
    found = Analysis(kind, name, run, ())
    return replace(found, arguments=(*options, "--out", str(found.folder)))


def _analyse(analysis: Analysis) -> bool:
    """Whether it could be done."""
    return not _run(["analyze", analysis.kind, *analysis.arguments])


def _run(arguments: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "trainer", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
