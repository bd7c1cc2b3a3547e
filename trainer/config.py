"""The configuration of a run: frozen dataclasses. presets.py has some."""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal


def _at_least(settings: object, low: int, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < low:
            raise ValueError(f"{name} must be at least {low}; got {getattr(settings, name)}")


@dataclass(frozen=True)
class Model:
    """The policy."""

    path: str = "tiny"
    """A transformers folder or hub name; "tiny" builds the 0.3 M-parameter Qwen3 for the ladder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights and of AdamW's moments. In bfloat16 a step of less than 1/512 of a
    weight rounds to nothing; float16 is left out, its second moments underflow."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the arithmetic; None: that of the weights. "bfloat16" beside float32 weights is mixed
    precision: weights and moments stay exact, and gradients are added up in float32."""
    attention: str = "eager"
    """transformers' attn_implementation: eager, sdpa, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in backward."""


@dataclass(frozen=True)
class Data:
    """Where problems come from."""

    task: str = "ladder"
    """The number "ladder" or "ladder:long", a reasoning-gym task as "gym:NAME", or a prompt set as
    "file:PATH" or "hub:NAME[:CONFIGURATION]"."""
    prompt_field: str = "prompt"
    """Prompt sets: the column of the question, text or chat messages."""
    answer_field: str = "answer"
    """Prompt sets: the column of the answer."""
    template: str = "auto"
    """"auto" applies the tokenizer's chat template where it has one, "none" nothing; any other
    text stands for itself, with the question in the place of {question}."""
    instruction: str = ""
    """Appended to every question of a prompt set or reasoning-gym task."""
    test_fraction: float = 0.05
    """Prompt sets without a test split: the share held out, by hash of the prompt."""

    def __post_init__(self) -> None:
        if self.template not in ("auto", "none") and "{question}" not in self.template:
            raise ValueError(
                'template must be "auto", "none" or a text with {question} in it; '
                f"got {self.template!r}"
            )


@dataclass(frozen=True)
class WarmStart:
    """Supervised steps before RL; kept and reused by later runs with the same settings."""

    steps: int = 0
    """0 trains from the model as it is."""
    traces: int = 30_000
    """How many demonstrations the task makes."""
    batch_size: int = 64
    """Demonstrations a step."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    warmup_steps: int = 50
    """Linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's."""
    cache: str = "runs/warm-starts"
    """Folder of finished warm starts, by hash of all that shapes them."""


@dataclass(frozen=True)
class Engine:
    """Who samples the responses."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """"transformers" samples with the model that is trained, token by token; "vllm" with vLLM, and
    the fields below are its."""
    placement: Literal["inside", "beside"] = "inside"
    """"inside" the trainer's process, or "beside" it in one of its own."""
    devices: tuple[int, ...] = ()
    """GPUs of engines beside, tensor_parallel for each rank of a machine in turn; none: each shares
    its trainer's and sleeps while that trains."""
    tensor_parallel: int = 1
    """GPUs an engine is spread over."""
    memory_utilization: float = 0.5
    """Share of a GPU's memory for vLLM's weights and cache."""
    kv_cache_bytes: int = 0
    """Of the key-value cache; 0: what `memory_utilization` leaves, on a CPU 256 MiB."""
    enforce_eager: bool = False
    """Without CUDA graphs and compilation; on a CPU always."""
    max_model_len: int = 0
    """Longest prompt and response together; 0: the model's positions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of vLLM's weights; "auto": the policy's."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "tensor_parallel")
        _at_least(self, 0, "kv_cache_bytes", "max_model_len")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(
                f"memory_utilization must lie in (0, 1]; got {self.memory_utilization}"
            )
        if self.placement == "inside" and (self.devices or self.tensor_parallel > 1):
            raise ValueError(
                'devices and tensor_parallel > 1 need placement="beside": inside, vLLM has the '
                f"trainer's GPU; got devices={self.devices}, tensor_parallel={self.tensor_parallel}"
            )


@dataclass(frozen=True)
class Rollout:
    """How responses are sampled."""

    prompts: int = 32
    """Prompts a sampling round."""
    group_size: int = 8
    """Responses a prompt, G."""
    max_new_tokens: int = 48
    """Length limit of a response, end-of-sequence included."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs and entropies in the loss."""
    batch_size: int = 256
    """Sequences an engine samples at once."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "prompts", "group_size", "max_new_tokens", "batch_size")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 to train on; got {self.temperature}")


@dataclass(frozen=True)
class Reward:
    """The verdict on a response, and what is added to it."""

    function: str = ""
    """A verifier of your own, "module:function", in place of the task's. It is called in processes
    of its own as `function(prompt=..., response=..., answer=...)`, the answer as the data has it,
    and returns a finite number."""
    seconds: float = 10.0
    """Limit of one answer in such a process; over it the answer scores 0 and is counted."""
    gigabytes: float = 4.0
    """What such a process may allocate beyond its imports; held on Linux."""
    workers: int = 4
    """Such processes at most, on each rank."""
    format: str = "boxed"
    """What a response of the right form has: "boxed", a closed \\boxed{...}; "answer",
    <answer>...</answer>; or a regular expression, searched for (in the trainer's process, without
    a time limit)."""
    format_weight: float = 0.0
    """Added to the reward of a response of the right form."""
    drop_truncated: bool = False
    """Leave truncated responses out of the loss (overlong filtering). They still count in their
    group's mean."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "workers")
        for name in ("seconds", "gigabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"reward.{name} must be > 0; got {getattr(self, name)}")
        try:
            re.compile(self.format)
        except re.error as error:
            raise ValueError(
                'reward.format must be "boxed", "answer" or a regular expression; got '
                f"{self.format!r}: {error}"
            ) from error


@dataclass(frozen=True)
class Algorithm:
    """The objective: GRPO or DAPO on the high-entropy tokens."""

    loss_type: Literal["dapo", "grpo"] = "dapo"
    """"dapo": one mean over the tokens of the step; "grpo": a mean of the sequences' means."""
    fraction: float = 0.2
    """Share of the response tokens that is trained on (1.0: all)."""
    which: Literal["top", "bottom", "random"] = "top"
    """Which tokens: the paper's, its ablation, and the control."""
    entropy_source: Literal["current", "old"] = "old"
    """"current": entropies of the policy being trained (the paper); the head runs on all tokens.
    "old": entropies of the sampling policy; the head runs on the kept tokens only."""
    denominator: Literal["selected", "all"] = "selected"
    """Paper v2 and its code divide by the selected tokens, v1 and TRL by all."""
    clip_low: float = 0.2
    """Lower clip range of the ratio."""
    clip_high: float = 0.28
    """Upper clip range of the ratio (clip-higher)."""
    dual_clip: float | None = None
    """Bound of the ratio for negative advantages (10 in the paper's scripts)."""
    correction: Literal["auto", "none", "tis", "mis"] = "auto"
    """Of the engine's mismatch, by pi_old / pi_sampler of each token: "tis" truncates it to
    [correction_floor, correction_cap], "mis" drops tokens outside; "auto": "tis" in bf16."""
    correction_cap: float = 2.0
    """Upper bound of the corrected ratio."""
    correction_floor: float = 0.0
    """Lower bound."""
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """"grpo" divides by the group's standard deviation, "dr_grpo" does not."""
    max_rounds: int = 1
    """Dynamic sampling: rounds of fresh prompts until `rollout.prompts` groups are useful."""
    min_groups: int = 4
    """Useful groups below which a step makes no update (it is counted)."""
    overlong_cache: int = 0
    """Soft punishment over the last `overlong_cache` tokens before the limit; 0: none."""
    overlong_factor: float = 1.0
    """Size of the punishment at the limit."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_rounds", "min_groups")
        _at_least(self, 0, "overlong_cache")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}")
        if not 0 <= self.correction_floor <= 1 <= self.correction_cap:
            raise ValueError(
                "0 <= correction_floor <= 1 <= correction_cap is wanted, or equal policies would "
                f"be corrected; got {self.correction_floor} and {self.correction_cap}"
            )
        if self.which != "top" and self.entropy_source != "old":
            raise ValueError(
                f'which={self.which!r} needs entropy_source="old": a threshold keeps the top; '
                f"got {self.entropy_source!r}"
            )


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    learning_rate: float = 2e-4
    """Constant after warm-up."""
    warmup_steps: int = 5
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    mini_batches: int = 2
    """Optimizer steps a sampling step."""
    tokens_per_micro_batch: int = 16_384
    """Tokens, prompt included and without padding, of one forward and backward of a rank; a longer
    sequence is one by itself."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "mini_batches", "tokens_per_micro_batch")


@dataclass(frozen=True)
class Tracking:
    """Where the metrics of a run go beside its metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Libraries that are installed; each has its own environment variables."""
    project: str = "entropy-kernels"
    """Of wandb and trackio."""

    def __post_init__(self) -> None:
        for name in self.trackers:
            if find_spec(name) is None:
                raise ValueError(f"tracker {name!r} is not installed: pip install {name}")


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "tiny"
    """Folder of the run under `root`."""
    root: str = "runs"
    """Where runs live."""
    seed: int = 0
    """Of everything random."""
    steps: int = 120
    """RL steps."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    device: str = "auto"
    """"auto": CUDA where there is one."""
    eval_every: int = 20
    """RL steps between evaluations; the first is before training."""
    eval_problems: int = 512
    """Held-out problems an evaluation, one sample each at temperature 1 and one greedy."""
    checkpoint_every: int = 10
    """RL steps between checkpoints."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    samples_every: int = 10
    """RL steps between writes of samples.jsonl."""
    samples: int = 8
    """Responses a write."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    warm_start: WarmStart = field(default_factory=WarmStart)
    engine: Engine = field(default_factory=Engine)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    algorithm: Algorithm = field(default_factory=Algorithm)
    optimizer: Optimizer = field(default_factory=Optimizer)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _at_least(self, 1, "eval_every", "eval_problems", "checkpoint_every", "keep_checkpoints")
        _at_least(self, 1, "samples_every")
        _at_least(self, 0, "steps", "samples", "threads")
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
