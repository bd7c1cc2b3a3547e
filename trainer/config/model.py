"""The policy, its warm start, and its optimizer."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least


def is_flash(attention: str) -> bool:
    """Whether `attention`, transformers' name of one, is a kind of flash attention, which takes the
    lengths of the sequences in a row."""
    return attention.startswith("flash_attention") or ("/" in attention and "flash" in attention)


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
    """transformers' attn_implementation: eager, sdpa, flash_attention_2 (3, 4), or a kernel of the
    hub, such as kernels-community/flash-attn2."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in backward."""


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
    max_nonfinite: int = 10
    """Updates in a row that may be skipped for a statistic, loss or gradient that is not finite;
    the next one ends the run."""
    tokens_per_micro_batch: int = 16_384
    """Tokens, prompt included and without padding, of one forward and backward of a rank; a longer
    sequence is one by itself."""

    def __post_init__(self) -> None:
        at_least(self, 1, "mini_batches", "tokens_per_micro_batch")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0; got {self.grad_clip}")
        at_least(self, 0, "max_nonfinite")
