"""The paper's measurements on two small tasks: entropy patterns, ablation, and all the rest.

python -m benchmarks.paper                  does what is missing, then writes docs/paper.md anew
python -m benchmarks.paper --hours 1        starts no run that would not end within an hour
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
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import paper_page

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/paper")
RESULTS = Path("benchmarks/results/paper")
SEEDS = 5
STEPS = 60
JOBS = 2
# Whose checkpoints are compared over training; of every seed.
EVOLVED = ("top-20", "all")
TRAIN = {
    "root": str(RUNS),
    "steps": STEPS,
    "eval-problems": 512,
    "eval-every": 20,
    "checkpoint-every": 20,
    "keep-checkpoints": 4,
}


@dataclass(frozen=True)
class Task:
    """One of the two."""

    label: str
    """Of its folders and files."""
    preset: str
    """Of the trainer."""
    data: str
    """As `--data` names it."""
    max_new_tokens: int
    """Of a response, as the preset has it."""


TASKS = (
    Task("ladder", "tiny", "ladder", 48),
    Task("ladder-long", "tiny-long", "ladder:long", 96),
)


@dataclass(frozen=True)
class Analysis:
    """One `python -m trainer analyze`, and the file its result is kept in."""

    kind: str
    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def result(self) -> Path:
        """Within the repository."""
        return RESULTS / f"{self.name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    status = 0
    if not (options.render or options.check):
        status = study(options.hours)
    return status or paper_page.write(ROOT, check=options.check)


def study(hours: float) -> int:
    """Train and analyse what is missing; 0 where all is done."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = [task.label for task in TASKS if _run(comparison(task, hours))]
    waiting = [a for task in TASKS for a in analyses(task) if not a.result.exists()]
    with ThreadPoolExecutor(JOBS) as pool:
        done = list(pool.map(_analyse, waiting))
    failed += [analysis.name for analysis, right in zip(waiting, done, strict=True) if not right]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def comparison(task: Task, hours: float) -> list[str]:
    """The command of all training runs of `task`."""
    train = [part for name, value in TRAIN.items() for part in (f"--config.{name}", str(value))]
    return [
        *("compare", task.preset, "--label", task.label, "--seeds", str(SEEDS)),
        *("--jobs", str(JOBS), "--hours", str(hours)),
        *("--out", str(RESULTS / f"{task.label}-comparison.json"), *train),
    ]


def analyses(task: Task) -> Iterator[Analysis]:
    """What is asked of the checkpoints of `task`."""
    folder = RUNS / task.label
    for seed in range(SEEDS):
        run = folder / "top-20" / f"seed-{seed}"
        base = str(run / "checkpoints" / "step-000000")
        ask = ("--data", task.data, "--max-new-tokens", str(task.max_new_tokens))
        yield _analysis("patterns", task, seed, (*ask, "--model", base))
        for arm in EVOLVED:
            run = folder / arm / f"seed-{seed}"
            yield _analysis("evolution", task, seed, (*ask, "--model", str(run)), arm)
        final = str(folder / "top-20" / f"seed-{seed}")
        yield _analysis("temperatures", task, seed, (*ask, "--model", final))


def _analysis(
    kind: str, task: Task, seed: int, arguments: tuple[str, ...], arm: str = ""
) -> Analysis:
    name = "-".join(part for part in (task.label, kind, arm, f"seed-{seed}") if part)
    folder = RUNS / task.label / "analyses" / name
    sizes = {
        "patterns": ("--problems", "1024", "--samples", "4"),
        "evolution": ("--problems", "512", "--samples", "2"),
        "temperatures": ("--problems", "512", "--samples", "1"),
    }
    options = (*arguments, *sizes[kind], "--out", str(folder))
    return Analysis(kind, name, folder, options)


def _analyse(analysis: Analysis) -> bool:
    """Whether it could be done; its result is then in place."""
    if _run(["analyze", analysis.kind, *analysis.arguments]):
        return False
    shutil.copyfile(analysis.folder / f"{analysis.kind}.json", analysis.result)
    json.loads(analysis.result.read_text())
    return True


def _run(arguments: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "trainer", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
