"""The objective."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least


@dataclass(frozen=True)
class Algorithm:
    """The objective: GRPO or DAPO on the high-entropy tokens."""

    loss_type: Literal["dapo", "grpo"] = "dapo"
    """"dapo": one mean over the tokens of the step; "grpo": a mean of the sequences' means."""
    fraction: float = 0.2
    """The share of the response tokens that is trained on (1.0: all)."""
    which: Literal["top", "bottom", "random"] = "top"
    """Tokens of the highest entropy (the paper), of the lowest (its ablation), or random ones."""
    entropy_source: Literal["current", "old"] = "old"
    """"current": entropies of the policy being trained (the paper); the head runs on all tokens.
    "old": entropies of the sampling policy; the head runs on the selected tokens only."""
    denominator: Literal["selected", "all"] = "selected"
    """The count that the loss is divided by: selected tokens (paper v2) or all (v1 and TRL)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high; DAPO's clip-higher."""
    dual_clip: float | None = None
    """The ratio's upper bound for negative advantages; 10 in the paper's scripts."""
    correction: Literal["auto", "none", "tis", "mis"] = "auto"
    """How the loss corrects for the engine's mismatch, r = pi_old / pi_sampler per token. "tis"
    truncates r to [correction_floor, correction_cap], "mis" drops tokens outside of it. "auto" is
    "tis" in bf16 and "none" in fp32."""
    correction_cap: float = 2.0
    """The upper bound of the corrected ratio."""
    correction_floor: float = 0.0
    """The lower bound of the corrected ratio."""
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """"grpo" divides by the group's standard deviation, "dr_grpo" does not."""
    max_rounds: int = 1
    """Dynamic sampling: at most so many rounds, until `rollout.prompts` groups are useful."""
    min_groups: int = 4
    """With fewer useful groups than this a step makes no update and is counted as skipped."""
    overlong_cache: int = 0
    """Responses are punished over the last `overlong_cache` tokens before the limit; 0: never."""
    overlong_factor: float = 1.0
    """The punishment at the limit."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_rounds", "min_groups")
        at_least(self, 0, "overlong_cache")
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
