"""A run from its start, fresh or resumed: policy, task, optimizer, log, and where it stands."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import entropy_kernels as ek
from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.checkpoint.branch import branch as branch_from
from trainer.checkpoint.resume import inputs_of, resuming, start_record
from trainer.config import Config
from trainer.config.changes import known_names
from trainer.engines import make_engine
from trainer.engines.engine import Engine
from trainer.entropy_bonus import make_controller
from trainer.evaluation.sets import EvaluationSet, sets_of_run
from trainer.finite import Guard, check_finite
from trainer.fsdp import scatter, shard, tensors
from trainer.launch.limits import check_model, check_ranks, model_limits
from trainer.launch.needs import check_needs
from trainer.launch.notes import say_parts, say_start
from trainer.log import RunLog, read_rows
from trainer.policy import Policy, check_policy, read_policy
from trainer.ranks import Ranks, local_ranks
from trainer.report.progress import WARM_START, progress
from trainer.rewards.verifier import Verifier
from trainer.rules import Rule
from trainer.tasks import make_task
from trainer.tasks.benchmarks import check_sets
from trainer.tasks.lengths import Room, check_prompts
from trainer.tasks.problem import Task
from trainer.tiny.warm_start import Demonstrator, load_or_warm_start


@dataclass
class Run:
    """The parts that the loop works with."""

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
    sets: Sequence[EvaluationSet] = ()  # what it is evaluated on
    rule: Rule | None = None  # what chooses tokens; None: what `algorithm.which` names
    guard: Guard = field(init=False)
    control: ek.EntropyController | None = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.settings.optimizer.max_nonfinite)
        self.control = make_controller(self.settings.algorithm)
        if self.control is not None and self.progress.entropy:
            self.control.load_state_dict(self.progress.entropy)

    def seed(self, part: int = 0) -> int:
        """The seed of a part of this step: a function of the run's seed, so a run resumes."""
        text = f"{self.settings.seed}/{self.progress.step}/{part}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def write(self, metrics: dict[str, float]) -> None:
        """Append a row to metrics.jsonl, on the first rank."""
        if self.ranks.first:
            self.log.write(metrics)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far; empty on all ranks except the first."""
        path = self.log.metrics_path
        return read_rows(path) if self.ranks.first and path.exists() else []

    @property
    def entropy_coef(self) -> float:
        """The coefficient of the entropy bonus in the next update."""
        return self.control.coef if self.control else self.settings.algorithm.entropy_coef

    def follow_entropy(self, entropy: float) -> None:
        """Move that coefficient by the mean entropy of an update's tokens over all ranks, nats."""
        if self.control is not None:
            self.control.update(entropy)
            self.progress.entropy = self.control.state_dict()

    def set_learning_rate(self) -> float:
        """Linear warm-up, then constant."""
        settings = self.settings.optimizer
        warm = min(1.0, (self.progress.updates + 1) / max(settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm
        return settings.learning_rate * warm


def check_start(settings: Config) -> None:
    """Raise ValueError, before anything is done, for what this machine lacks."""
    check_needs(settings)
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    check_ranks(settings, local_ranks(), 0 if on_cpu else torch.cuda.device_count())


def start(
    settings: Config, ranks: Ranks, allow_changes: Sequence[str] = (), branch: str = ""
) -> Run:
    """The run of `settings`, from its last checkpoint where its folder has one.

    `allow_changes` names settings, or groups of them, that may differ from the last start although
    a run usually keeps them. `branch` names a run or one of its checkpoints, from which a new
    folder begins.

    Raises:
        ValueError: the folder holds a run with other settings, or damaged checkpoints only; prompts
            do not fit. The verifier cannot be imported, or a set of `eval.data` cannot be read.
    """
    allow_changes = known_names(allow_changes)
    check_sets(settings.eval.data)
    folder = settings.folder
    if branch:
        branch_from(branch, settings, ranks)
    found = checkpoint.latest(folder, ranks)
    fresh = found is None
    earlier = ranks.on_first(lambda: resuming(folder, settings, allow_changes, bool(branch), fresh))
    changes = earlier.settings_changes() if earlier else []
    say_start(settings, folder, found, ranks)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    policy = _read(settings, ranks, found)
    task = make_task(settings.data, settings.seed, policy.tokenizer)
    room = Room.of(policy.longest, settings)
    left_out = check_prompts(task, policy.tokenizer, room, settings.data.max_prompt_tokens)
    inputs = ranks.on_first(lambda: inputs_of(settings, task))
    changes = earlier.input_changes(changes, inputs) if earlier else []
    verifier = Verifier(task, settings.reward)
    verifier.start()  # early, as its processes take a while
    sets = sets_of_run(settings, task, verifier, policy, ranks)
    engine = _make_ready(settings, ranks, policy, task, fresh)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=settings.optimizer.learning_rate,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
        fused=True,  # else it copies tensors as large as the embedding
    )
    state = checkpoint.load(found, policy, optimizer, ranks) if found else Progress()
    read = f"as it is read from {found or settings.model.path}"
    warm = " and warm-started" if fresh and settings.warm_start.steps else ""
    check_finite(tensors(policy.model).items(), ranks, read + warm)
    check_policy(policy, settings.model.impl)
    say_parts(settings, policy, task, ranks, left_out, changes)
    engine.update_weights(policy.weights())
    log = RunLog(folder)
    if ranks.first:
        record = start_record(state.step, changes, inputs, left_out)
        log = RunLog.open(folder, settings, _describe(ranks), record)
        log.rewind(-1 if fresh else state.step)
    return Run(
        settings, folder, ranks, policy, engine, task, verifier, optimizer, log, state, fresh, sets
    )


def _read(settings: Config, ranks: Ranks, found: Path | None) -> Policy:
    """The model; without values if a checkpoint has them, and on all ranks except the first."""
    model = settings.model
    if found is not None:
        model = dataclasses.replace(model, path=str(found))
    read: list[Policy] = []
    empty, longest = found is not None or not ranks.first, settings.engine.max_model_len
    ranks.on_all(
        lambda: read.append(read_policy(model, settings.seed, empty=empty, longest=longest))
    )
    policy = read[0]
    check_model(settings, *model_limits(policy.model.config))
    policy.chat = settings.data.template == "auto"
    if ranks.group is None:
        policy.materialize(ranks.device)
    return policy


def _make_ready(settings: Config, ranks: Ranks, policy: Policy, task: Task, fresh: bool) -> Engine:
    """Make the warm start of a fresh run, the engine, and the shards where there is a group. Only
    the first rank has read the weights, and deals them out."""
    model = settings.model
    if fresh and settings.warm_start.steps:
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
        if fresh:
            scatter(policy.model, whole, ranks)
    return engine


def _warm_start(settings: Config, policy: Policy, task: Task, device: torch.device) -> None:
    if not isinstance(task, Demonstrator):
        print(f"no warm start: task {task.name!r} has no demonstrations")
        return
    policy.to(device)
    warm, made = settings.warm_start, False
    with progress("warm start", warm.steps, columns=WARM_START) as bar:

        def report(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal made
            made = True
            bar.update(step, metrics)

        given = policy.model, policy.tokenizer, task, warm, settings.seed, report
        kept = load_or_warm_start(*given, settings.model.impl)
    if not made:
        print(f"warm start: reused from an earlier run, {kept}")


def _describe(ranks: Ranks) -> str:
    device, several = ranks.device, f"{ranks.size} x " if ranks.size > 1 else ""
    if device.type == "cuda":
        return several + torch.cuda.get_device_name(device)
    return f"{several}{device.type}, {torch.get_num_threads()} threads"
