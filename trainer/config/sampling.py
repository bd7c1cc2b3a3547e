"""Who samples the responses, and how."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least


@dataclass(frozen=True)
class Engine:
    """Who samples the responses."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """"transformers" samples token by token with the model that is trained; "vllm" uses vLLM, to
    which all other options of the engine belong."""
    placement: Literal["inside", "beside"] = "inside"
    """Whether vLLM runs inside the trainer's process or beside it, in a process of its own."""
    devices: tuple[int, ...] = ()
    """The GPUs of engines beside the trainer: tensor_parallel for each rank of a machine, in order.
    By default an engine shares its trainer's GPU and sleeps while that trains."""
    tensor_parallel: int = 1
    """The number of GPUs that share one engine's weights."""
    memory_utilization: float = 0.5
    """The share of a GPU's memory for vLLM's weights and cache."""
    kv_cache_bytes: int = 0
    """Bytes of the key-value cache; 0: what `memory_utilization` leaves, or 256 MiB on a CPU."""
    enforce_eager: bool = False
    """Do without CUDA graphs and compilation, as always on a CPU."""
    max_model_len: int = 0
    """The longest prompt and response together, for transformers too; 0: the model's positions.
    longrope and dynamic NTK scale positions for this length, in all sequences."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of vLLM's weights; "auto": the policy's."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor_parallel")
        at_least(self, 0, "kv_cache_bytes", "max_model_len")
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
class Truncation:
    """What is left of the vocabulary to sample from: min-p, then top-k, then top-p, as in vLLM.

    The temperature comes first. By default nothing is cut off. Greedy sampling needs no truncation
    and ignores it.
    """

    top_k: int = 0
    """The number of most probable tokens that are kept; 0: all."""
    top_p: float = 1.0
    """The most probable tokens are kept until their mass reaches this share; 1.0: all."""
    min_p: float = 0.0
    """Tokens are kept that are at least this share as probable as the most probable; 0.0: all."""

    def __post_init__(self) -> None:
        at_least(self, 0, "top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1]; got {self.min_p}")

    @property
    def off(self) -> bool:
        """Whether the whole vocabulary is kept."""
        return self == NO_TRUNCATION

    def __str__(self) -> str:
        """As in "top-k 20, top-p 0.9"; empty where the whole vocabulary is kept."""
        named = {"min-p": self.min_p, "top-k": self.top_k, "top-p": self.top_p}
        off = {"min-p": 0.0, "top-k": 0, "top-p": 1.0}
        return ", ".join(f"{name} {x:g}" for name, x in named.items() if x != off[name])


NO_TRUNCATION = Truncation()
"""The whole vocabulary is kept."""


@dataclass(frozen=True)
class Rollout:
    """How responses are sampled."""

    prompts: int = 32
    """Prompts per sampling round."""
    group_size: int = 8
    """Responses per prompt, G; at least 2, since an advantage compares them."""
    max_new_tokens: int = 48
    """The longest response in tokens, end-of-sequence included."""
    temperature: float = 1.0
    """The temperature of sampling, and of the log-probs and entropies in the loss."""
    top_k: int = 0
    """Sample from the `top_k` most probable tokens; 0: from all. With `top_k`, `top_p` or `min_p`
    log-probs and entropies are over the tokens that are kept, in the loss too."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose mass reaches this share; 1.0: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as probable as the most probable one; 0.0: from
    all."""
    batch_size: int = 256
    """The number of sequences that an engine samples at once."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts", "max_new_tokens", "batch_size")
        if self.group_size < 2:
            raise ValueError(
                "rollout.group_size must be at least 2: an advantage compares the responses to one "
                f"prompt; got {self.group_size}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 to train on; got {self.temperature}")
        _ = self.truncation  # which checks itself

    @property
    def truncation(self) -> Truncation:
        """What is left of the vocabulary to sample from."""
        return Truncation(self.top_k, self.top_p, self.min_p)
