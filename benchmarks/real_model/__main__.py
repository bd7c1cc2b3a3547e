"""A pretrained model: its steps, engines, RL on sums, entropies, temperatures and overlap.

python -m benchmarks.real_model --model FOLDER [--plan] [--only PART ...] [--root runs/real-model]

Does what is missing, part by part, and says beforehand how long that takes; then writes the page
anew. Stopped at any moment, the same command goes on: with the runs and temperatures from where
they were, with others anew. Runs and checkpoints of one model go to --root, results to
benchmarks/results/real_model/.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import paper_page
from benchmarks.real_model import kept
from benchmarks.real_model.studies import ARMS, EVOLVED, SEEDS, Studies

# Threads of two processes that keep to their cores would share the first.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false"}
# Runs at a time.
TOGETHER = 2


class Part(NamedTuple):
    """What is done, whether it is, an estimate of its minutes on two cores, and what it needs."""

    name: str
    do: Callable[[Studies], int]
    done: Callable[[Studies], bool]
    minutes: float
    after: str = ""


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
    if trouble := studies.another_model():
        parser.error(f"--root {options.root} has the studies of {trouble}; choose another --root")
    missing = [part for part in _asked(options.only) if not part.done(studies)]
    for part in missing:
        print(f"{part.name}: about {part.minutes:.0f} minutes")
    print(f"{sum(part.minutes for part in missing):.0f} minutes in all, as estimated for two cores")
    if options.plan:
        return 0
    studies.begin()
    failed = [part.name for part in missing if not _done(part, studies)]
    # After all runs and analyses: each notes a dirty checkout.
    kept.keep(studies)
    paper_page.write(Path())
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on", file=sys.stderr)
    return int(bool(failed))


def _done(part: Part, studies: Studies) -> bool:
    """Whether it is done now, which cannot be before what it needs is."""
    needed = next((x for x in PARTS if x.name == part.after), None)
    if needed is not None and not needed.done(studies):
        print(f"{part.name} is left out: {needed.name} is not done", file=sys.stderr)
        return False
    return part.do(studies) == 0 and part.done(studies)


def _asked(names: list[str]) -> list[Part]:
    return [part for part in PARTS if not names or part.name in names]


def steps(studies: Studies) -> int:
    """The steps, and the head alone."""
    suite = ["benchmarks/bench_real_model.py", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *suite, "--model", str(studies.model)]
    return _measured(studies, "steps", command)


def engines(studies: Studies) -> int:
    """Tokens per second, by an interpreter that has vLLM where there is one."""
    vllm = Path(".venv-vllm/bin/python")
    python = str(vllm) if vllm.exists() else sys.executable
    command = [python, "-m", "benchmarks.real_model.engines", "--model", str(studies.model)]
    return _measured(studies, "engines", command)


def _measured(studies: Studies, name: str, command: list[str]) -> int:
    """Note that it was measured here: result files may be those of another machine."""
    if (status := _run(command)) == 0:
        studies.measured(name).touch()
    return status


def base(studies: Studies) -> int:
    """The warm start."""
    return _run(studies.base_command())


def learning(studies: Studies) -> int:
    """All arms and seeds, TOGETHER runs at a time; then the results of all.

    A run that has ended keeps its checkpoints where they are analysed.
    """
    failed = 0
    for arms, seeds in _together():
        if not _has_room(studies):
            return 1
        failed |= _run(studies.learning_command(arms, seeds), ONE_THREAD)
        for run in (studies.root / "sums").glob("*/seed-*"):
            analysed = run in [studies.run(arm, 0) for arm in EVOLVED]
            if studies.ended(run).exists() and not analysed:
                shutil.rmtree(run / "checkpoints")
    return failed or _run(studies.learning_command(ARMS, range(SEEDS)), ONE_THREAD)


def _together() -> Iterator[tuple[tuple[str, ...], range]]:
    """Arms and seeds of TOGETHER runs or fewer, in turn."""
    for first in range(0, SEEDS, TOGETHER):
        seeds = range(first, min(first + TOGETHER, SEEDS))
        width = TOGETHER // len(seeds)
        for place in range(0, len(ARMS), width):
            yield ARMS[place : place + width], seeds


def _has_room(studies: Studies) -> bool:
    """Whether the disk has room for the checkpoints of TOGETHER runs and those that are analysed.

    Weights and moments take three times the weights of the warm start's checkpoint, and as much
    again while they are written.
    """
    weights, there = _size(studies.started), _size(studies.root / "sums")
    need = 3 * weights * (2 * TOGETHER + len(EVOLVED)) - there
    free = shutil.disk_usage(studies.root).free
    if free < need:
        print(
            f"{studies.root} must have {need / 1e9:.1f} GB free for checkpoints; "
            f"got {free / 1e9:.1f} GB",
            file=sys.stderr,
        )
    return free >= need


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    Part("base", base, lambda studies: studies.started.exists(), 15),
    Part("learning", learning, learned, 130, "base"),
    Part("patterns", analyses("patterns"), analysed("patterns"), 35),
    Part("temperatures", analyses("temperatures"), analysed("temperatures"), 20, "learning"),
    Part("evolution", analyses("evolution"), analysed("evolution"), 10, "learning"),
    # Last, as they write result files: what is run in a changed checkout notes that.
    Part("steps", steps, lambda studies: studies.measured("steps").exists(), 25),
    Part("engines", engines, lambda studies: studies.measured("engines").exists(), 12),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
