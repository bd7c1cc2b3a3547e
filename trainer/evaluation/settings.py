"""What an evaluation of one model asks for."""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import tyro

from trainer.config import Engine, Truncation

SAMPLES = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """One model on some data. Options that are left out come from the model's run, if it is a run
    or a checkpoint of one; otherwise from the paper's protocol."""

    model: str
    """A transformers folder or hub name, a checkpoint, or a run's folder for its last one."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """aime24, aime25, amc23, math500, minerva, olympiadbench, from the hub or as NAME=PATH from a
    local copy; file:PATH, hub:NAME[:CONFIGURATION], gym:NAME or ladder. Can be repeated. A run also
    has "held-out", the problems kept from its training. By default what training evaluates on."""
    samples: int | None = None
    """Responses per problem. By default 16, or as many as in training if no data is named."""
    problems: int = 0
    """The number of problems of each set; 0: all, or for held-out as in training."""
    temperature: float | None = None
    """The sampling temperature; 0 is greedy. By default the run's `eval.temperature`, or 1."""
    top_k: int | None = None
    """Sample from the `top_k` most probable tokens; 0: from all. By default the run's `eval.top_k`,
    or 0."""
    top_p: float | None = None
    """Sample from the most probable tokens whose mass reaches this share; 1: from all. By default
    the run's `eval.top_p`, or 1."""
    min_p: float | None = None
    """Sample from tokens at least this share as probable as the most probable one; 0: from all. By
    default the run's `eval.min_p`, or 0."""
    max_new_tokens: int = 0
    """The longest response in tokens; 0: the run's limit, or 20,480 if the model has room."""
    template: str = ""
    """A template as for `data.template`, or "paper", which contains the instruction. By default the
    run's, or "auto"."""
    instruction: str = "auto"
    """The text after each question; "auto": the run's, or to reason and to box the answer."""
    prompt_field: str = ""
    """The column of the question in file: and hub: data; by default the run's, or "prompt"."""
    answer_field: str = ""
    """The column of the answer in file: and hub: data; by default the run's, or "answer"."""
    split: str = "test"
    """The split to read from file: and hub: data that has splits."""
    function: str | None = None
    """A verifier of your own for all sets, "module:function", or empty for the sets' own ones. By
    default the run's verifier for held-out, file: and hub: data, and the other sets' own."""
    right: float | None = None
    """The least verdict on a right answer, for all sets. By default the run's where its verifier is
    used, and 1 elsewhere."""
    seconds: float | None = None
    """Seconds that a verifier in its own process may take per answer; by default the run's limit,
    or 10."""
    gigabytes: float | None = None
    """Gigabytes that such a process may allocate after its imports; by default the run's, or 4."""
    workers: int = 4
    """The largest number of such processes on each rank."""
    out: str = ""
    """Folder of the results; by default in `evaluations`, named after the model."""
    seed: int = 0
    """The seed of sampling; training evaluates with 0."""
    batch_size: int = 256
    """Sequences sampled between two writes; a problem's responses stay together."""
    device: str = "auto"
    """"auto": CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the weights; "auto": the one in which the run sampled, or float32."""
    attention: str = "auto"
    """transformers' attn_implementation: eager, sdpa, flash_attention_2; "auto": the run's, or
    sdpa."""
    engine: Engine = field(default_factory=Engine)
    """The engine; a `max_model_len` of 0 stands for the run's."""

    def __post_init__(self) -> None:
        least = {"samples": 1, "batch_size": 1, "problems": 0, "temperature": 0, "workers": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        _ = truncation_of(self)  # which checks itself


def given(value: T | None, default: T) -> T:
    """`value`, or `default` where it was left out."""
    return default if value is None else value


def samples_of(settings: Evaluation) -> int:
    """Responses per problem, once `resolved`."""
    return given(settings.samples, SAMPLES)


def temperature_of(settings: Evaluation) -> float:
    """The sampling temperature, once `resolved`."""
    return given(settings.temperature, 1.0)


def truncation_of(settings: Evaluation) -> Truncation:
    """What is left of the vocabulary to sample from, once `resolved`."""
    return Truncation(
        given(settings.top_k, 0), given(settings.top_p, 1.0), given(settings.min_p, 0.0)
    )
