"""The arms of the studies, each as a change of one configuration.

Names follow "Beyond the 80/20 Rule" (arXiv 2506.01939v2), sections 5.2 and 5.3.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from trainer.config import Config
from trainer.config.algorithm import is_rule

Study = Literal["ablation", "algorithms", "rules"]

# DAPO's objective, whatever the preset's is: the names of the arms must be true.
ALWAYS: Mapping[str, Any] = {
    "loss_type": "dapo",
    "advantage": "grpo",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "fraction": 0.2,
    "which": "top",
    "entropy_source": "auto",
    "denominator": "selected",
}

# One round seldom fills a batch: a preset that waits for a full one would then never update.
_PLAIN: Mapping[str, Any] = {
    "fraction": 1.0,
    "clip_high": 0.2,
    "dual_clip": None,
    "overlong_cache": 0,
    "max_rounds": 1,
    "min_groups": 4,
}

ARMS: Mapping[str, Mapping[str, Any]] = {
    "top-20": {},
    "all": {"fraction": 1.0},
    "random-20": {"which": "random"},
    "bottom-80": {"fraction": 0.8, "which": "bottom"},
    "bottom-70": {"fraction": 0.7, "which": "bottom"},
    "top-10": {"fraction": 0.1},
    "top-5": {"fraction": 0.05},
    "top-30": {"fraction": 0.3},
    "top-50": {"fraction": 0.5},
    "top-20-current": {"entropy_source": "current"},
    "top-20-over-all": {"denominator": "all"},
    "grpo": {**_PLAIN, "loss_type": "grpo"},
    "ppo": {**_PLAIN, "advantage": "dr_grpo"},
    "stapo": {"which": "stapo"},
    "rsi": {"which": "rsi"},
    "gmts-20": {"which": "gmts"},
    "nat-random-20": {"which": "nat-random"},
    "nat-random-50": {"which": "nat-random", "fraction": 0.5},
    "nat-prefix-50": {"which": "nat-prefix", "fraction": 0.5},
}
"""The changes of each arm in `Algorithm`, from the top 20% of the old policy's entropies.

"ppo" is PPO's clipped objective with the gradient of every token: one clip range, a mean over
tokens, one round of sampling, and the mean of the group in the place of a critic, not divided by
the standard deviation. Groups whose rewards are all equal have no gradient, and are left out of its
mean as of all others. "grpo" adds that division and takes a mean over sequences of their means.
"all" is DAPO, "top-20" DAPO on forking tokens. "top-30" and "bottom-70" are not in
the paper: they part the tokens where the decisions of the long ladder begin. The last six are rules
of later papers (docs/losses.md). STAPO counts the lower 80% of the entropies as low.
"""

STUDIES: Mapping[Study, tuple[str, ...]] = {
    "ablation": (
        *("top-20", "all", "random-20", "bottom-80", "bottom-70", "top-10", "top-5", "top-30"),
        *("top-50", "top-20-current", "top-20-over-all"),
    ),
    "algorithms": ("ppo", "grpo", "all", "top-20"),
    "rules": (
        *("top-20", "all", "random-20", "stapo", "rsi", "gmts-20"),
        *("nat-random-20", "nat-random-50", "nat-prefix-50"),
    ),
}


def is_arm(arm: str) -> bool:
    """Whether there is such an arm; a rule's name is one, or "module:function"."""
    return arm in ARMS or is_rule(arm)


def arm_config(base: Config, label: str, arm: str, seed: int) -> Config:
    """The run of `arm` with `seed`: `base` with its name, its seed and the changes of the arm.

    A rule's name is the arm of that rule, with a `fraction` of 0.2. Raises ValueError for an
    unknown arm.
    """
    if not is_arm(arm):
        raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}, and rules by name")
    algorithm = replace(base.algorithm, **{**ALWAYS, **ARMS.get(arm, {"which": arm})})
    return replace(base, name=f"{label}/{arm}/seed-{seed}", seed=seed, algorithm=algorithm)
