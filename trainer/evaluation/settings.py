"""What an evaluation of one model asks for."""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import tyro

from trainer.config import Engine

SAMPLES = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """One model on some data. What is left out is as its run has it, where the model is a run or a
    checkpoint of one, and else the paper's protocol."""

    model: str
    """A transformers folder or hub name, a checkpoint, or a run's folder for its last one."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """aime24, aime25, amc23, math500, minerva, olympiadbench, from the hub or as NAME=PATH from a
    local copy; file:PATH, hub:NAME[:CONFIGURATION], gym:NAME or ladder. Can be repeated. Of a run
    also "held-out", the problems that it kept from its training; none: these, as in training."""
    samples: int | None = None
    """Responses to each problem; None: 16, and where data is none as many as in training."""
    problems: int = 0
    """The first so many problems of each set; 0: all, and of held-out as many as in training."""
    temperature: float | None = None
    """Of sampling, without top-p or top-k; 0 is greedy. None: the run's `eval.temperature`, or
    1."""
    max_new_tokens: int = 0
    """Length limit of a response; 0: the run's, or 20,480 where the model has the positions."""
    template: str = ""
    """As `data.template` of a run, or "paper", which has the instruction in it; empty: the run's,
    or "auto"."""
    instruction: str = "auto"
    """As `data.instruction` of a run; "auto": the run's, or to reason and to box the answer."""
    prompt_field: str = ""
    """Of file: and hub: sources: the column of the question; empty: the run's, or "prompt"."""
    answer_field: str = ""
    """Of file: and hub: sources: the column of the answer; empty: the run's, or "answer"."""
    split: str = "test"
    """Of file: and hub: sources with splits: which."""
    function: str | None = None
    """As `reward.function` of a run, for all sets: a verifier of your own, "module:function", or
    empty for the sets' own. None: the run's for held-out, file: and hub:, for others their own."""
    right: float | None = None
    """As `reward.right` of a run, for all sets: verdicts of at least this are right. None: the
    run's where its verifier is used, else 1."""
    seconds: float | None = None
    """Limit of the verifier for one answer, where it runs in processes of its own; None: the run's,
    or 10."""
    gigabytes: float | None = None
    """What such a process may allocate beyond its imports; None: the run's, or 4."""
    workers: int = 4
    """Such processes at most, on each rank."""
    out: str = ""
    """Folder of the results; by default in `evaluations`, named after the model."""
    seed: int = 0
    """Of sampling; training evaluates with 0."""
    batch_size: int = 256
    """Sequences sampled between two writes, by whole problems."""
    device: str = "auto"
    """"auto": CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; "auto": that in which the run sampled, or float32."""
    attention: str = "auto"
    """transformers' attn_implementation: eager, sdpa, flash_attention_2; "auto": the run's, or
    sdpa."""
    engine: Engine = field(default_factory=Engine)
    """`max_model_len` is the run's where it is 0."""

    def __post_init__(self) -> None:
        least = {"samples": 1, "batch_size": 1, "problems": 0, "temperature": 0, "workers": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name} must be at least {low}; got {value}")


def given(value: T | None, default: T) -> T:
    """`value`, or `default` where it was left out."""
    return default if value is None else value


def samples_of(settings: Evaluation) -> int:
    """Responses to each problem, once `resolved`."""
    return given(settings.samples, SAMPLES)


def temperature_of(settings: Evaluation) -> float:
    """Of sampling, once `resolved`."""
    return given(settings.temperature, 1.0)
