"""The policy, its warm start, and its optimizer."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least


def is_flash(attention: str) -> bool:
    """Whether transformers' `attention` is a flash attention, which takes the lengths of the
    sequences in a row."""
    return attention.startswith("flash_attention") or ("/" in attention and "flash" in attention)


Impl = Literal["auto", "reference", "torch", "cpu", "triton", "cuda"]
"""Backends of `entropy_kernels`."""


@dataclass(frozen=True)
class Model:
    """The policy."""

    path: str = "tiny"
    """A transformers folder or hub name; "tiny" builds the 0.3 M-parameter Qwen3 for the ladder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights and of AdamW's moments. In bfloat16 a step of less than 1/512 of a
    weight is lost to rounding. float16 is not offered: its second moments underflow."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of the arithmetic; by default the weights'. "bfloat16" with float32 weights is
    mixed precision: weights and moments stay exact, and gradients are summed in float32."""
    attention: str = "eager"
    """transformers' attn_implementation: eager, sdpa, flash_attention_2 (3, 4), or a kernel of the
    hub, such as kernels-community/flash-attn2."""
    impl: Impl = "auto"
    """The backend of head, selection and loss, as `impl` of `entropy_kernels`. "auto" is the
    fastest one known to be right here; "reference" is slow and holds all logits."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in backward."""


@dataclass(frozen=True)
class WarmStart:
    """Supervised steps before RL. Later runs with the same settings reuse the result."""

    steps: int = 0
    """The number of steps; 0: RL starts from the model as it is."""
    traces: int = 30_000
    """The number of demonstrations; of a prompt set all rows, if it has fewer."""
    batch_size: int = 64
    """Demonstrations per step."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    warmup_steps: int = 50
    """Linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    cache: str = "runs/warm-starts"
    """The folder of finished warm starts, named by a hash of all settings that shape them."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    learning_rate: float = 2e-4
    """Constant after warm-up."""
    warmup_steps: int = 5
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    mini_batches: int = 2
    """Optimizer steps per sampling step."""
    max_nonfinite: int = 10
    """The number of successive updates that may be skipped because a statistic, the loss or the
    gradient is not finite. The next such update ends the run."""
    tokens_per_micro_batch: int = 16_384
    """The most tokens in one forward and backward of a rank, with prompts and without padding. A
    longer sequence is a micro-batch by itself."""

    def __post_init__(self) -> None:
        at_least(self, 1, "mini_batches", "tokens_per_micro_batch")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0; got {self.grad_clip}")
        at_least(self, 0, "max_nonfinite")
