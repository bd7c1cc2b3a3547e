"""One run, evaluated and tracked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.config.algorithm import Algorithm
from trainer.config.checks import at_least
from trainer.config.data import Data, Reward
from trainer.config.model import Model, Optimizer, WarmStart
from trainer.config.sampling import Engine, Rollout, Truncation


@dataclass(frozen=True)
class Eval:
    """Evaluation during training."""

    every: int = 20
    """RL steps between evaluations; there is one before training too, and one after it."""
    problems: int = 512
    """The number of held-out problems of the task, which may have fewer, and of problems of each
    generated set in `data`."""
    data: tuple[str, ...] = ()
    """Sets evaluated beside them, whole: aime24, aime25, amc23, math500, minerva, olympiadbench,
    from the hub or as NAME=PATH from a local copy. Others are file:PATH, hub:NAME[:CONFIGURATION],
    gym:NAME, ladder or ladder:long. Prompts are rendered as those of `data` are."""
    samples: int = 1
    """Sampled responses per problem; a greedy one is added."""
    temperature: float = 1.0
    """The temperature of the sampled responses."""
    top_k: int = 0
    """The sampled responses are drawn from the `top_k` most probable tokens; 0: from all."""
    top_p: float = 1.0
    """The sampled responses are drawn from the most probable tokens whose mass reaches this share;
    1.0: from all."""
    min_p: float = 0.0
    """The sampled responses are drawn from tokens at least this share as probable as the most
    probable one; 0.0: from all."""
    max_new_tokens: int = 0
    """The longest response in tokens; 0: as in `rollout`."""

    def __post_init__(self) -> None:
        at_least(self, 1, "every", "problems", "samples")
        at_least(self, 0, "max_new_tokens")
        if not self.temperature > 0:
            raise ValueError(
                f"eval.temperature must be > 0, greedy responses are added; got {self.temperature}"
            )
        _ = self.truncation  # which checks itself

    @property
    def truncation(self) -> Truncation:
        """What is left of the vocabulary to sample from."""
        return Truncation(self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Tracking:
    """Where the metrics of a run go beside its metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Installed libraries that get the metrics; their own environment variables configure them."""
    project: str = "entropy-kernels"
    """The project's name in wandb and trackio."""


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "tiny"
    """The run's folder under `root`; slashes make folders in folders."""
    root: str = "runs"
    """The folder of all runs."""
    seed: int = 0
    """The seed of everything random."""
    steps: int = 120
    """RL steps."""
    threads: int = 0
    """CPU threads of torch; 0: torch's choice."""
    device: str = "auto"
    """"auto": CUDA where there is one."""
    checkpoint_every: int = 10
    """RL steps between checkpoints."""
    keep_checkpoints: int = 2
    """The number of last checkpoints that are kept, beside those of `keep_every`."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps, 0 included, are never deleted, for `evaluate`,
    `analyze` and branches. A multiple of `checkpoint_every`; 0: no such checkpoints."""
    samples_every: int = 10
    """RL steps between writes of samples.jsonl."""
    samples: int = 8
    """Responses per write."""
    eval: Eval = field(default_factory=Eval)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    warm_start: WarmStart = field(default_factory=WarmStart)
    engine: Engine = field(default_factory=Engine)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    algorithm: Algorithm = field(default_factory=Algorithm)
    optimizer: Optimizer = field(default_factory=Optimizer)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.root) / self.name

    def __post_init__(self) -> None:
        path = Path(self.name)
        if (
            not path.parts
            or path.is_absolute()
            or ".." in path.parts
            or not self.name.isprintable()
        ):
            raise ValueError(
                'name must be that of a folder below root, such as "tiny" or "paper/seed-0"; got '
                f"{self.name!r}"
            )
        at_least(self, 1, "checkpoint_every", "keep_checkpoints", "samples_every")
        at_least(self, 0, "seed", "steps", "samples", "threads", "keep_every")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every must be 0 or a multiple of checkpoint_every, {self.checkpoint_every}; "
                f"got {self.keep_every}"
            )
        if self.algorithm.min_groups > self.rollout.prompts:
            raise ValueError(
                f"algorithm.min_groups must be at most rollout.prompts, {self.rollout.prompts}, or "
                f"every step is skipped; got {self.algorithm.min_groups}"
            )
        if self.algorithm.overlong_cache > self.rollout.max_new_tokens:
            raise ValueError(
                "algorithm.overlong_cache must be at most rollout.max_new_tokens, "
                f"{self.rollout.max_new_tokens}; got {self.algorithm.overlong_cache}"
            )
