"""The commands of the studies on a pretrained model, and what each leaves.

Every command is one of the trainer's. Runs, and the sweep of temperatures, go on where they were
stopped; other analyses begin anew. Two processes of one thread each are faster on two cores than
one of two.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_model import prompts
from benchmarks.real_model.prompts import KINDS
from trainer.checkpoint.resume import folder_digest
from trainer.log import replace_text

ARMS = ("top-20", "all", "random-20", "bottom-80", "gmts-20")
EVOLVED = ("top-20", "all")
SEEDS, STEPS, JOBS = 3, 20, 2
PROBLEMS = 300
SUMS_TOKENS, TOKENS = 64, 192
# The temperatures below and above the threshold, beside a 1.
LOW, HIGH = (0.0, 0.6, 1.0, 1.5), (0.0, 0.6, 1.5)
# Responses to each of prompts.PROMPTS prompts: at most 57,600 tokens of a kind.
SAMPLES = 1


@dataclass(frozen=True)
class Studies:
    """Where a model's studies read and write."""

    model: Path
    root: Path
    """The folder of runs, prompts and analyses, of which nothing is committed."""

    @property
    def data(self) -> Path:
        """The folder of the prompts."""
        return self.root / "data"

    @property
    def base(self) -> Path:
        """The run whose first checkpoint is the model after its warm start."""
        return self.root / "base"

    @property
    def started(self) -> Path:
        """The folder of the model after its warm start."""
        return self.base / "checkpoints" / "step-000000"

    @property
    def known(self) -> Path:
        """The file that names the model whose studies these are."""
        return self.root / "model.json"

    def another_model(self) -> str:
        """What the studies in the folder are of, if not of this model; else nothing."""
        if not self.known.exists():
            return ""
        known = json.loads(self.known.read_text())
        return "" if known["digest"] == folder_digest(self.model) else str(known["model"])

    def begin(self) -> None:
        """Write the prompts, which are the same each time, and what the studies are of."""
        prompts.write(self.data)
        mine = {"model": str(self.model), "digest": folder_digest(self.model)}
        replace_text(self.known, json.dumps(mine) + "\n")

    def measured(self, name: str) -> Path:
        """The file that is there once steps or engines were measured."""
        return self.root / f"{name}.measured"

    def ended(self, run: Path) -> Path:
        """The last checkpoint of a run of the learning study."""
        return run / "checkpoints" / f"step-{STEPS:06d}"

    def run(self, arm: str, seed: int) -> Path:
        """The folder of a run of the learning study."""
        return self.root / "sums" / arm / f"seed-{seed}"

    @property
    def learned(self) -> Path:
        """The results of the learning study."""
        return self.root / "learning.json"

    def base_command(self) -> list[str]:
        """A warm start on worked sums, its evaluation, and no RL."""
        settings = self._settings() | {
            "name": "base",
            "steps": 0,
            "model.path": self.model,
            "data.demonstration-field": "worked",
            "warm-start.steps": 160,
            "warm-start.batch-size": 8,
            "warm-start.learning-rate": 5e-5,
            "warm-start.warmup-steps": 5,
            "warm-start.cache": self.root / "warm-starts",
            "threads": 2,
        }
        return _trainer("train", "tiny", *_options(settings))

    def learning_command(self, arms: Sequence[str], seeds: range) -> list[str]:
        """RL from the model after its warm start, evaluated once there."""
        settings = self._settings() | {
            "steps": STEPS,
            "threads": 1,
            "model.path": self.model,
            "warm-start.steps": 0,  # the branch has had its own
            "rollout.prompts": 8,
            "rollout.group-size": 4,
            "rollout.batch-size": 32,
            "algorithm.max-rounds": 1,
            "algorithm.min-groups": 1,
            "algorithm.old-logprob": "sampler",
            "optimizer.learning-rate": 2e-6,
            "checkpoint-every": max(STEPS // 3, 1),
            "keep-checkpoints": 1,
        }
        of_all = ["--label", "sums", "--jobs", str(JOBS), "--out", str(self.learned)]
        of_all += ["--branch", f"{self.base}@0"]
        of_all += ["--seeds", str(len(seeds)), "--first-seed", str(seeds.start)]
        return _trainer("compare", "tiny", *of_all, "--arms", *arms, *_options(settings))

    def _settings(self) -> dict[str, object]:
        return {
            "root": self.root,
            "model.attention": "sdpa",
            "data.task": f"file:{self.data / 'sums.jsonl'}",
            "data.template": "none",
            "data.test-fraction": 0.06,
            "rollout.max-new-tokens": SUMS_TOKENS,
            "eval.problems": PROBLEMS,
            "reward.format": "The answer is",  # which tells wrong answers from none
            "eval.every": STEPS,  # an evaluation takes as long as ten
        }

    def analyses(self) -> Iterator["Analysis"]:
        """What is done with the trained models and with the pretrained one."""
        for kind in KINDS:
            folder = self.root / "patterns" / kind
            data = ["--data", f"file:{self.data / f'{kind}.jsonl'}", "--template", "none"]
            size = ["--samples", str(SAMPLES), "--max-new-tokens", str(TOKENS), "--minimum", "1"]
            size += ["--batch-size", str(prompts.PROMPTS)]  # a few left over would take as long
            options = ["--model", str(self.model), *data, "--instruction", "", *size]
            yield Analysis("patterns", kind, folder, tuple(options))
        top = self.run("top-20", 0)
        options = ["--model", str(top), "--data", "held-out", "--problems", str(PROBLEMS)]
        options += ["--samples", "1", "--low", *map(str, LOW), "--high", *map(str, HIGH)]
        yield Analysis("temperatures", "sums", self.root / "temperatures", tuple(options))
        for arm in EVOLVED:
            run = self.run(arm, 0)
            both = str(self.started), str(self.ended(run))
            options = ["--model", str(run), "--checkpoints", *both]
            options += ["--data", "held-out", "--problems", str(PROBLEMS), "--samples", "1"]
            yield Analysis("evolution", arm, self.root / "evolution" / arm, tuple(options))


@dataclass(frozen=True)
class Analysis:
    """One `python -m trainer analyze`."""

    kind: str
    of: str
    folder: Path
    options: tuple[str, ...]

    @property
    def file(self) -> Path:
        """Its result."""
        return self.folder / f"{self.kind}.json"

    @property
    def done(self) -> bool:
        """Whether its result is there, and whole: that of temperatures grows point by point."""
        if not self.file.exists():
            return False
        points = json.loads(self.file.read_text()).get("points")
        return points is None or len(points) == len(LOW) + len(HIGH)

    def command(self) -> list[str]:
        """The whole command."""
        return _trainer("analyze", self.kind, *self.options, "--out", str(self.folder))


def _trainer(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


def _options(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
