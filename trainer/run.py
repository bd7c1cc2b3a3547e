"""A run from its start, fresh or resumed: policy, task, optimizer, log, and where it stands."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.config import Config
from trainer.engines import Engine, make_engine
from trainer.log import RunLog
from trainer.policy import Policy, load_policy
from trainer.progress import WARM_START, progress
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verifier
from trainer.tasks import make_task
from trainer.types import Task
from trainer.warm_start import load_or_warm_start


@dataclass
class Run:
    """What the loop works with."""

    settings: Config
    folder: Path
    ranks: Ranks
    policy: Policy
    engine: Engine
    task: Task
    verifier: Verifier
    optimizer: torch.optim.Optimizer
    log: RunLog
    progress: Progress
    fresh: bool = False  # nothing is on disk yet

    def seed(self, part: int = 0) -> int:
        """Of the random numbers of this step: a function of the run's seed, so a run resumes."""
        text = f"{self.settings.seed}/{self.progress.step}/{part}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def set_learning_rate(self) -> float:
        """Linear warm-up, then constant."""
        settings = self.settings.optimizer
        warm = min(1.0, (self.progress.updates + 1) / max(settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm
        return settings.learning_rate * warm


def start(settings: Config, ranks: Ranks) -> Run:
    """The run of `settings`, from its last checkpoint where its folder has one.

    Raises:
        ValueError: the folder holds a run with other settings, or a damaged checkpoint, or the
            verifier cannot be imported.
    """
    folder = Path(settings.root) / settings.name
    found = checkpoint.latest(folder)
    if found is not None:
        _check_same(folder, settings)
        checkpoint.check(found)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    policy, task, verifier = _parts(settings, ranks, found)
    engine = make_engine(settings, policy)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=settings.optimizer.learning_rate,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )
    log = RunLog.open(folder, settings, device=_describe(policy.device))
    run = Run(settings, folder, ranks, policy, engine, task, verifier, optimizer, log, Progress())
    if found is None:
        log.rewind(-1)
        run.fresh = True
        return run
    checkpoint.load_optimizer(found, optimizer)
    run.progress = checkpoint.load_progress(found)
    log.rewind(run.progress.step)
    return run


def _parts(settings: Config, ranks: Ranks, found: Path | None) -> tuple[Policy, Task, Verifier]:
    """From a checkpoint, or from the model and its warm start."""
    model = settings.model
    if found is not None:
        model = dataclasses.replace(model, path=str(found))
    policy = load_policy(model, settings.seed, ranks.device)
    task = make_task(settings.data, settings.seed, policy.tokenizer)
    verifier = Verifier(task, settings.reward)
    verifier.start()  # before what takes long
    warm = settings.warm_start
    if found is None and warm.steps:
        with progress("warm start", warm.steps, columns=WARM_START) as bar:
            load_or_warm_start(
                policy.model, policy.tokenizer, task, warm, settings.seed, bar.update
            )
    return policy, task, verifier


def _check_same(folder: Path, settings: Config) -> None:
    """A run resumes with the settings it was started with; `steps` and the folder may change."""
    before = json.loads((folder / "run.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    different = [
        f"{name} was {old}, now {new}"
        for name, (old, new) in sorted(_pairs(before, now).items())
        if old != new and name not in ("steps", "name", "root")
    ]
    if different:
        raise ValueError(
            f"{folder} holds a run with other settings: {'; '.join(different)}. "
            "Choose another --name, or delete the folder."
        )


def _pairs(before: dict, now: dict, prefix: str = "") -> dict[str, tuple[object, object]]:
    pairs: dict[str, tuple[object, object]] = {}
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs |= _pairs(old, new, f"{prefix}{name}.")
        else:
            pairs[prefix + name] = (old, new)
    return pairs


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
