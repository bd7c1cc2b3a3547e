"""Who samples the responses, and how."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least


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
    """Longest prompt and response together, with transformers too; 0: the model's positions.
    Positions that longrope or dynamic NTK scale are scaled for this length in all sequences."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of vLLM's weights; "auto": the policy's."""

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
class Rollout:
    """How responses are sampled."""

    prompts: int = 32
    """Prompts a sampling round."""
    group_size: int = 8
    """Responses a prompt, G; an advantage compares them, so 2 at least."""
    max_new_tokens: int = 48
    """Length limit of a response, end-of-sequence included."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs and entropies in the loss."""
    batch_size: int = 256
    """Sequences an engine samples at once."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts", "max_new_tokens", "batch_size")
        if self.group_size < 2:
            raise ValueError(
                "rollout.group_size must be at least 2: an advantage compares the responses to one "
                f"prompt; got {self.group_size}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 to train on; got {self.temperature}")
