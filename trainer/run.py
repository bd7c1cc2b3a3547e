"""A run from its start, fresh or resumed: policy, task, optimizer, log, and where it stands."""

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.config import Config
from trainer.engines import Engine, make_engine
from trainer.fsdp import scatter, shard, tensors
from trainer.log import RunLog
from trainer.policy import Policy, check_policy, read_policy
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

    def write(self, metrics: dict[str, float]) -> None:
        """Append a row to metrics.jsonl; the first rank does."""
        if self.ranks.first:
            self.log.write(metrics)

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
        ValueError: the folder holds a run with other settings, or damaged checkpoints only, or the
            verifier cannot be imported.
    """
    folder = Path(settings.root) / settings.name
    found = checkpoint.latest(folder, ranks)
    if found is not None:
        _check_same(folder, settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    policy, engine, task, verifier = _parts(settings, ranks, found)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=settings.optimizer.learning_rate,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )
    fresh = found is None
    state = checkpoint.load(found, policy, optimizer, ranks) if found else Progress()
    check_policy(policy)
    if ranks.first and policy.layout == "padded":
        name = type(policy.model).__name__
        print(f"{name} does not keep packed sequences apart: one sequence a row", file=sys.stderr)
    engine.update_weights(policy.weights())
    log = RunLog(folder)
    if ranks.first:
        log = RunLog.open(folder, settings, device=_describe(ranks))
        log.rewind(-1 if fresh else state.step)
    return Run(
        settings, folder, ranks, policy, engine, task, verifier, optimizer, log, state, fresh
    )


def _parts(
    settings: Config, ranks: Ranks, found: Path | None
) -> tuple[Policy, Engine, Task, Verifier]:
    """The model and its warm start, without values where a checkpoint has them; sharded where there
    is a group: then the first rank alone reads the weights, and deals out their shards."""
    model = settings.model
    if found is not None:
        model = dataclasses.replace(model, path=str(found))
    read: list[Policy] = []
    empty = found is not None or not ranks.first
    ranks.on_all(lambda: read.append(read_policy(model, settings.seed, empty=empty)))
    policy = read[0]
    if ranks.group is None:
        policy.materialize(ranks.device)
    task = make_task(settings.data, settings.seed, policy.tokenizer)
    verifier = Verifier(task, settings.reward)
    verifier.start()  # before what takes long
    if found is None and settings.warm_start.steps:
        ranks.on_first(lambda: _warm_start(settings, policy, task, ranks.device))
    dtype = getattr(torch, model.compute_dtype or model.dtype)
    # The engine's copy is made of whole weights.
    copy_in = dtype if ranks.group is not None else None
    engine = make_engine(settings, policy, ranks.device, copy_in)
    if ranks.group is not None:
        policy.compute_dtype = dtype
        whole = tensors(policy.model) if ranks.first else {}  # before they are shards
        shard(policy, policy.model, ranks, dtype)
        policy.materialize(ranks.device)
        if found is None:
            scatter(policy.model, whole, ranks)
    return policy, engine, task, verifier


def _warm_start(settings: Config, policy: Policy, task: Task, device: torch.device) -> None:
    policy.to(device)
    warm = settings.warm_start
    with progress("warm start", warm.steps, columns=WARM_START) as bar:
        load_or_warm_start(policy.model, policy.tokenizer, task, warm, settings.seed, bar.update)


def _check_same(folder: Path, settings: Config) -> None:
    """A run resumes with its settings; `steps`, the folder and the trackers may change."""
    before = json.loads((folder / "run.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    different = [
        f"{name} was {old}, now {new}"
        for name, (old, new) in sorted(_pairs(before, now).items())
        if old != new and name.partition(".")[0] not in ("steps", "name", "root", "tracking")
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


def _describe(ranks: Ranks) -> str:
    device, several = ranks.device, f"{ranks.size} x " if ranks.size > 1 else ""
    if device.type == "cuda":
        return several + torch.cuda.get_device_name(device)
    return f"{several}{device.type}, {torch.get_num_threads()} threads"
