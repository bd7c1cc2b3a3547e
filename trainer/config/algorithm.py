"""The objective."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.checks import at_least

OF_FRACTION = ("top", "bottom", "random", "gmts", "nat-random", "nat-prefix")
"""Rules that train on `fraction` of the tokens."""
OTHERS = ("stapo", "rsi", "clip-cov", "clip-discriminator")
"""Rules that keep as many as it comes to."""
WEIGHING = ("nat-random", "nat-prefix", "clip-cov")
"""Rules whose losses have a weight per token."""


def is_rule(name: str) -> bool:
    """Whether `name` is a rule's, or has the form of "module:function"."""
    return name in (*OF_FRACTION, *OTHERS) or all(name.partition(":"))


@dataclass(frozen=True)
class Algorithm:
    """The objective: GRPO or DAPO on the high-entropy tokens."""

    loss_type: Literal["dapo", "grpo"] = "dapo"
    """"dapo": one mean over the tokens of the step; "grpo": a mean of the sequences' means."""
    fraction: float = 0.2
    """The share of the response tokens that is trained on (1.0: all)."""
    which: str = "top"
    """The rule that chooses the tokens. "top" takes the highest entropies (the paper), "bottom" the
    lowest, "random" any. Others are stapo, rsi, gmts, nat-random, nat-prefix, clip-cov,
    clip-discriminator, and "module:function" of your own: docs/trainer.md."""
    old_logprob: Literal["auto", "sampler", "recomputed"] = "auto"
    """The log-probs that ratios are taken to. "sampler": as the engine reported them;
    "recomputed": by the policy in a scoring pass, a forward over all responses. "auto" is "sampler"
    in fp32 with the sampler's entropies, and "recomputed" elsewhere."""
    entropy_source: Literal["auto", "sampler", "old", "current"] = "auto"
    """Whose entropies select the tokens. "sampler": the engine's, known without a scoring pass;
    "old": the policy's before the step's updates, from that pass. With either the head trains on
    the selected tokens only. "current": those of the policy being trained (the paper); the head
    runs on all tokens. "auto" is "sampler"."""
    compare_every: int = 20
    """RL steps between comparisons of the sampler's log-probs, entropies and tokens with the
    policy's, for which the scoring pass runs anyway; 0: never."""
    denominator: Literal["selected", "all"] = "selected"
    """The count that the loss is divided by: selected tokens (paper v2) or all (v1 and TRL). It is
    all for rules that weigh tokens: nat-random, nat-prefix, clip-cov."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high; DAPO's clip-higher."""
    dual_clip: float | None = None
    """The ratio's upper bound for negative advantages; 10 in the paper's scripts."""
    correction: Literal["auto", "none", "tis", "mis"] = "auto"
    """How the loss corrects for the engine's mismatch, r = pi_old / pi_sampler per token, or
    pi / pi_sampler where old_logprob is the sampler's. "tis" truncates r to [correction_floor,
    correction_cap], "mis" drops tokens outside of it. "auto" is "tis" in bf16 and "none" in
    fp32."""
    correction_cap: float = 2.0
    """The upper bound of the corrected ratio."""
    correction_floor: float = 0.0
    """The lower bound of the corrected ratio."""
    entropy_coef: float = 0.0
    """Times the mean entropy of the tokens of `entropy_over`, nats, is subtracted from the loss.
    With a target or a band it is where the coefficient begins."""
    entropy_target: float | None = None
    """A mean entropy, nats. At or below it the coefficient rises and applies; above it the
    coefficient falls and does not apply: Skywork-OR1 (arXiv 2505.22312), as TRL has it."""
    entropy_band: tuple[float, float] | None = None
    """The mean entropies, nats, below which the coefficient rises and above which it falls."""
    entropy_delta: float = 0.005
    """By how much it rises or falls in an update."""
    entropy_bounds: tuple[float, float] = (0.0, 1.0)
    """The least and the largest coefficient of a target or band; a negative one costs entropy."""
    entropy_over: Literal["selected", "all"] = "selected"
    """The tokens whose entropies count: the selected ones, or all. With all every row of the head
    gets a gradient."""
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
        at_least(self, 0, "overlong_cache", "compare_every")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}")
        if not 0 <= self.correction_floor <= 1 <= self.correction_cap:
            raise ValueError(
                "0 <= correction_floor <= 1 <= correction_cap is wanted, or equal policies would "
                f"be corrected; got {self.correction_floor} and {self.correction_cap}"
            )
        if not is_rule(self.which):
            names = ", ".join((*OF_FRACTION, *OTHERS))
            raise ValueError(
                f'which must be one of {names} or "module:function"; got {self.which!r}'
            )
        self._check_entropy()
        if self.which != "top" and self.entropy_source == "current":
            raise ValueError(
                f"which={self.which!r} needs entropies that are known before the update, as a "
                f'threshold keeps the top: entropy_source "sampler" or "old"; got "current"'
            )

    def _check_entropy(self) -> None:
        if self.entropy_target is not None and self.entropy_band is not None:
            raise ValueError(
                "entropy_target and entropy_band both say what is held; give one of them, got "
                f"{self.entropy_target} and {self.entropy_band}"
            )
        for name in ("entropy_band", "entropy_bounds"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{name} must have the lower number first; got {pair}")
        if self.entropy_band is not None and self.entropy_band[0] < 0:
            raise ValueError(f"entropy_band must be at least 0; got {self.entropy_band}")
        at_least(self, 0, "entropy_delta", *(["entropy_target"] if self.entropy_target else []))
        low, high = self.entropy_bounds
        if self.controls_entropy and not low <= self.entropy_coef <= high:
            raise ValueError(
                f"entropy_coef must lie within entropy_bounds, {self.entropy_bounds}; got "
                f"{self.entropy_coef}"
            )
        if self.bonus_on_all and self.which in WEIGHING:
            raise ValueError(
                f'entropy_over="all" has no meaning where a rule weighs tokens, as '
                f'which={self.which!r} does; use "selected"'
            )
        unknown = not self.mask_known and self.denominator == "selected"
        if self.bonus_on_all and self.loss_type == "dapo" and unknown:
            raise ValueError(
                'entropy_over="all" needs the number of selected tokens before the update: '
                'entropy_source "sampler" or "old", or denominator="all"; got '
                f"{self.entropy_source!r} and {self.denominator!r}"
            )

    @property
    def controls_entropy(self) -> bool:
        """Whether the coefficient of the entropy bonus follows the entropy."""
        return self.entropy_target is not None or self.entropy_band is not None

    @property
    def has_bonus(self) -> bool:
        """Whether the loss has an entropy bonus."""
        return self.controls_entropy or self.entropy_coef != 0

    @property
    def bonus_on_all(self) -> bool:
        """Whether every row of the head gets a gradient, of the bonus's."""
        return self.has_bonus and self.entropy_over == "all"

    @property
    def mask_known(self) -> bool:
        """Whether the tokens are known before the forward of an update."""
        return self.entropy_source != "current" or self.fraction == 1

    @property
    def share(self) -> float:
        """The share of the tokens that is trained on; 1, the most, where a rule does not say."""
        return self.fraction if self.which in OF_FRACTION else 1.0
