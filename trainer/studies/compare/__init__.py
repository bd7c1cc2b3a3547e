"""`python -m trainer compare PRESET [--options]`: the paper's ablation and baselines, by seeds.

Each arm (arms.py) is a run of the trainer with each seed; a seed makes the model,
its warm start, its problems and its samples, so that intervals over seeds are over all of these.
What is finished is not done again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from trainer.config import Config
from trainer.launch.needs import check_needs
from trainer.studies.compare.arms import ALWAYS, ARMS, STUDIES, Study, arm_config, is_arm


@dataclass(frozen=True)
class Comparison:
    """The runs to compare, and how they are done."""

    studies: tuple[Study, ...] = ("ablation", "algorithms")
    """The studies whose arms are run: fractions of the tokens with their controls; algorithms;
    rules of later papers."""
    arms: tuple[str, ...] = ()
    """Only these arms, of any study, or rules by the names that --algorithm.which takes."""
    seeds: int = 5
    """Replications of each arm."""
    first_seed: int = 0
    """The least seed."""
    jobs: int = 2
    """The number of processes at a time, each with `threads` threads, by default one."""
    hours: float = 0.0
    """The budget of wall time; 0: no limit. The next call goes on with the runs that are left."""
    label: str = ""
    """The task's name in folders; by default made of the data's name."""
    out: str = ""
    """The file of the results; by default ROOT/LABEL/comparison.json."""
    branch: str = ""
    """RUN, RUN@STEP or a checkpoint, from which every run begins, as in train: its weights, and its
    evaluation, which is then done once. Seeds make problems and samples, no model."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """The settings that all runs share."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.hours < 0:
            raise ValueError(f"hours must be at least 0; got {self.hours}")
        if unknown := sorted(arm for arm in self.arms if not is_arm(arm)):
            raise ValueError(
                f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}, and rules by name"
            )


def runs(settings: Comparison) -> list[Config]:
    """All runs of `settings`: every arm of the first seed, then of the next."""
    arms = dict.fromkeys(arm for study in settings.studies for arm in STUDIES[study])
    chosen = dict.fromkeys(settings.arms or arms)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    label = _label(settings)
    return [arm_config(settings.config, label, arm, seed) for seed in seeds for arm in chosen]


def compare(settings: Comparison) -> int:
    """Do the runs that are missing and write the results; 0 if all are finished."""
    from trainer.launch.lock import owned
    from trainer.report.progress import progress
    from trainer.rules import rule_named
    from trainer.studies.compare.collect import collect, write
    from trainer.studies.compare.driver import drive, is_finished
    from trainer.studies.compare.report import write_files

    configs = runs(settings)
    check_needs(*configs)
    for config in configs:
        rule_named(config.algorithm.which)
    _check_beginnings(configs, settings.branch)
    folder = Path(settings.config.root) / _label(settings)
    out = Path(settings.out or folder / "comparison.json")
    if out.is_dir():
        raise ValueError(f"out must be a file; got the folder {out}")

    def results() -> None:
        write(out, collect(_label(settings), configs, asdict(settings)))

    with owned(folder), owned(out, beside=True):
        started = sum(is_finished(config, settings.branch) for config in configs)
        with progress("runs", len(configs), started, columns={}) as bar:

            def shown(done: int) -> None:
                results()
                bar.update(done, {})

            outcome = drive(configs, settings.jobs, settings.hours, shown, settings.branch)
        results()
        found = json.loads(out.read_text("utf-8"))
        if outcome.finished:
            write_files(found, out)
    if idle := [f"{run['arm']}/seed-{run['seed']}" for run in found["runs"] if not run["rows"]]:
        print(
            f"warning: every step of {', '.join(idle)} was skipped, so nothing was trained there; "
            f"python -m trainer report {folder / idle[0]} tells why",
            file=sys.stderr,
        )
    for name, lines in outcome.failed.items():
        print(f"{name} failed:\n{lines}", file=sys.stderr)
    if outcome.left:
        print(f"{len(outcome.left)} runs are left; the same command goes on", file=sys.stderr)
    print(f"results: {out}")
    return int(bool(outcome.failed or outcome.left))


def _check_beginnings(configs: Sequence[Config], branch: str) -> None:
    """Raise ValueError where a run began elsewhere, or where those that are left cannot begin."""
    import torch

    from trainer.checkpoint import find
    from trainer.checkpoint.branch import find_origin
    from trainer.ranks import Ranks
    from trainer.studies.compare.driver import began_elsewhere, is_finished

    for config in configs:
        if began := began_elsewhere(config, branch):
            raise ValueError(
                f"{config.folder} began at {began}, not at {branch or 'a beginning of its own'}; "
                "choose another --label, or that --branch"
            )
    if branch and not all(is_finished(config, branch) for config in configs):
        origin = find_origin(branch)
        find(origin.run, origin.step, Ranks(torch.device("cpu")))


def _label(settings: Comparison) -> str:
    return settings.label or settings.config.data.task.replace(":", "-").replace("/", "-")


def main(arguments: list[str]) -> int:
    """Run the comparison that `arguments` ask for; returns the exit status."""
    from trainer.launch.command_line import parse

    _check_own(arguments)
    return compare(
        parse(
            arguments,
            "python -m trainer compare",
            "The paper's ablation and baselines from one preset, by seeds. The options up to "
            "--branch are the comparison's; all others are those of train, for every run.",
            lambda config: Comparison(config=config),
        )
    )


def _check_own(arguments: list[str]) -> None:
    """Raise ValueError for options of `train` that a comparison sets itself, in every run."""
    own = {"--name": "--label", "--seed": "--seeds and --first-seed"}
    own |= {f"--algorithm.{name.replace('_', '-')}": "--arms" for name in ALWAYS}
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option in own:
            raise ValueError(f"{option} is set in each run by {own[option]}; got {argument}")
