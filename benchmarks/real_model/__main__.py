"""A pretrained model: its steps, engines, RL on sums, entropies, temperatures and overlap.

python -m benchmarks.real_model --model FOLDER [--plan] [--only PART ...] [--root runs/real-model]

Does what is missing, part by part, and says beforehand how long that takes; then writes the page
anew. Stopped at any moment, the same command goes on. Runs and checkpoints go to --root, results to
benchmarks/results/real_model/.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import paper_page
from benchmarks.real_model import kept, prompts
from benchmarks.real_model.studies import EVOLVED, SEEDS, Studies

# Threads of two processes that keep to their cores would share the first.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false"}
# Seeds that are run together: an odd number of runs would leave a core idle more often.
TOGETHER = 2


class Part(NamedTuple):
    """What is done, whether it is, and an estimate of its minutes on two cores."""

    name: str
    do: Callable[[Studies], int]
    done: Callable[[Studies], bool]
    minutes: float


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_model", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model")
    parser.add_argument("--root", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], default=[])
    parser.add_argument("--plan", action="store_true", help="say what is missing, and do nothing")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(f"--model must be a folder with config.json; got {options.model}")
    studies = Studies(options.model, options.root)
    missing = [part for part in _asked(options.only) if not part.done(studies)]
    for part in missing:
        print(f"{part.name}: about {part.minutes:.0f} minutes")
    print(f"{sum(part.minutes for part in missing):.0f} minutes in all, as estimated for two cores")
    if options.plan:
        return 0
    if not studies.data.exists():
        prompts.write(studies.data)
    failed = []
    for part in missing:
        if part.do(studies) or not part.done(studies):
            failed.append(part.name)
        kept.keep(studies)
        paper_page.write(Path())
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on", file=sys.stderr)
    return int(bool(failed))


def _asked(names: list[str]) -> list[Part]:
    return [part for part in PARTS if not names or part.name in names]


def steps(studies: Studies) -> int:
    """The steps, and the head alone."""
    suite = ["benchmarks/bench_real_model.py", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    return _run([sys.executable, "-m", "pytest", *suite, "--model", str(studies.model)])


def engines(studies: Studies) -> int:
    """Tokens per second, by an interpreter that has vLLM where there is one."""
    vllm = Path(".venv-vllm/bin/python")
    python = str(vllm) if vllm.exists() else sys.executable
    return _run([python, "-m", "benchmarks.real_model.engines", "--model", str(studies.model)])


def base(studies: Studies) -> int:
    """The warm start."""
    return _run(studies.base_command())


def learning(studies: Studies) -> int:
    """All arms, two seeds at a time. Weights and moments of a run take 12 bytes per parameter; of
    those that have ended, only those that are analysed stay."""
    for first in range(0, SEEDS, TOGETHER):
        seeds = range(first, min(first + TOGETHER, SEEDS))
        if _run(studies.learning_command(seeds), ONE_THREAD):
            continue  # the last command says which
        for seed in seeds:
            for run in (studies.root / "sums").glob(f"*/seed-{seed}"):
                if seed or run.parent.name not in EVOLVED:
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return _run(studies.learning_command(range(SEEDS)), ONE_THREAD)


def learned(studies: Studies) -> bool:
    """Whether all runs have ended."""
    return kept.runs(studies) == kept.WANTED


def analyses(kind: str) -> Callable[[Studies], int]:
    """Those of a kind that are missing."""

    def do(studies: Studies) -> int:
        missing = [x for x in studies.analyses() if x.kind == kind and not x.done]
        return max((_run(one.command()) for one in missing), default=0)

    return do


def analysed(kind: str) -> Callable[[Studies], bool]:
    """Whether none of a kind is missing."""
    return lambda studies: all(x.done for x in studies.analyses() if x.kind == kind)


def _run(command: list[str], environment: dict[str, str] | None = None) -> int:
    return subprocess.run(command, env={**os.environ, **(environment or {})}).returncode


PARTS = (
    Part("steps", steps, lambda _: kept.steps_file() is not None, 25),
    Part("engines", engines, lambda _: kept.ENGINES.exists(), 12),
    Part("base", base, lambda studies: studies.started.exists(), 12),
    Part("learning", learning, learned, 110),
    Part("patterns", analyses("patterns"), analysed("patterns"), 45),
    Part("temperatures", analyses("temperatures"), analysed("temperatures"), 20),
    Part("evolution", analyses("evolution"), analysed("evolution"), 10),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
